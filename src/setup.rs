//! `weft setup`: the host's own resolver learns of the cluster's names, and forgets them again with `--undo`.

pub mod lines;
pub mod plan;

use crate::exec;
use anyhow::{Context, Result, anyhow};
use nanoserde::{DeJson, SerJson};
use plan::{DNSMASQ, Files, LOOKED_AT, Record, Resolver, UCI, Wants};
use std::{
    fs::{self, File, OpenOptions},
    io::{self, ErrorKind, Write as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _, chown},
    path::{Path, PathBuf},
};

/// What was done, for the undoing.
const RECORD: &str = "/etc/weft/setup.json";
const SYSTEMD: &str = "/run/systemd/system";

/// What `weft setup` is to do.
#[derive(Debug)]
pub struct Order {
    pub wants: Wants,
    pub undo: bool,
    /// Below which the files are; with another one than / nothing is restarted.
    pub root: PathBuf,
    pub restart: bool,
}

/// The resolvers that are installed below `root`.
#[must_use]
pub fn resolvers(root: &Path) -> Vec<Resolver> {
    let there = |path: &str| below(root, path).exists();
    let dnsmasq = if there(UCI) {
        Some(Resolver::Uci)
    } else {
        [DNSMASQ, "/etc/dnsmasq.d"].into_iter().any(there).then_some(Resolver::Dnsmasq)
    };
    let resolved = ["/etc/systemd/resolved.conf", "/usr/lib/systemd/systemd-resolved"].into_iter().any(there);
    dnsmasq.into_iter().chain(resolved.then_some(Resolver::Resolved)).collect()
}

/// Whether [`run`] has been there.
#[must_use]
pub fn is_done(root: &Path) -> bool {
    below(root, RECORD).exists()
}

fn below(root: &Path, path: &str) -> PathBuf {
    root.join(path.trim_start_matches('/'))
}

/// Does it, and says what it did, line by line.
///
/// # Errors
/// When a file cannot be read or written, or a resolver does not start again.
pub fn run(order: &Order) -> Result<Vec<String>> {
    let Order { wants, undo, root, restart } = order;
    let old = read_record(root)?;
    let mut files = Files::new();
    let of_record = old.iter().flat_map(|r| r.files.iter().map(|f| f.path.as_str()));
    for path in LOOKED_AT.into_iter().chain(of_record) {
        files.insert(path.into(), read(root, path)?);
    }
    let before = files.clone();
    if old.is_some() || *undo {
        plan::revert(&mut files, old.as_ref(), wants);
    }
    let resolvers = resolvers(root);
    let mut record = Record::default();
    if !undo {
        record = plan::apply(&mut files, &resolvers, wants).map_err(anyhow::Error::msg)?;
        if old.is_none() && record.files.is_empty() {
            // All is there, and the record of it was lost, as by OpenWrt's sysupgrade.
            plan::revert(&mut files, None, wants);
            record = plan::apply(&mut files, &resolvers, wants).map_err(anyhow::Error::msg)?;
        }
    }
    record.directories = old.map(|old| old.directories).unwrap_or_default();

    let mut said = Vec::new();
    if !undo && !record.files.is_empty() {
        // First of all, so that what is half done can be undone.
        directories(root, RECORD, &mut record.directories)?;
        for path in files.iter().filter(|(_, text)| text.is_some()).map(|(path, _)| path) {
            directories(root, path, &mut record.directories)?;
        }
        write(root, RECORD, &record.serialize_json())?;
    }
    let mut changed = Vec::new();
    for (path, text) in files.iter().filter(|(path, text)| before.get(*path) != Some(*text)) {
        match text {
            Some(text) => write(root, path, text)?,
            None => fs::remove_file(below(root, path)).with_context(|| path.clone())?,
        }
        let was = before.get(path).is_some_and(Option::is_some);
        let did = if text.is_none() {
            "removed "
        } else if was {
            "changed "
        } else {
            "wrote "
        };
        said.push([did, path].concat());
        changed.push(path.as_str());
    }
    if *undo {
        remove(root, &record.directories)?;
    }
    if *restart && root == Path::new("/") {
        for resolver in resolvers.iter().filter(|r| changed.iter().any(|path| is_of(path, **r))) {
            said.push(start_again(*resolver)?);
        }
    } else if !changed.is_empty() {
        said.push("not restarted: what was changed counts from the resolver's next start".into());
    }
    if said.is_empty() {
        said.push(nothing(*undo, &resolvers, wants));
    }
    Ok(said)
}

fn nothing(undo: bool, resolvers: &[Resolver], wants: &Wants) -> String {
    if undo {
        return "nothing was there to be undone".into();
    }
    if !resolvers.is_empty() {
        return "all is in place already".into();
    }
    let ip = wants.server.ip().to_string();
    ["neither dnsmasq nor systemd-resolved is here: make ", &ip, " the first nameserver of /etc/resolv.conf"].concat()
}

fn is_of(path: &str, resolver: Resolver) -> bool {
    match resolver {
        Resolver::Uci => path == UCI,
        Resolver::Dnsmasq => path.starts_with("/etc/dnsmasq"),
        Resolver::Resolved => path.starts_with("/etc/systemd"),
    }
}

fn start_again(resolver: Resolver) -> Result<String> {
    let service = resolver.name();
    let script = ["/etc/init.d/", service].concat();
    let systemctl = exec::find("systemctl").filter(|_| Path::new(SYSTEMD).exists());
    let (program, args) = match (systemctl, resolver) {
        (Some(systemctl), _) => (systemctl, vec!["try-restart", service]),
        (None, Resolver::Uci | Resolver::Dnsmasq) if Path::new(&script).exists() => (script.into(), vec!["restart"]),
        (None, _) => return Ok([service, " has to be restarted: how, only you know"].concat()),
    };
    let done = crate::reactor::block_on(exec::run(&program, &args, "", |_| ()));
    done.with_context(|| ["the files are written, but ", service, " does not start again"].concat())?;
    Ok(["restarted ", service].concat())
}

fn read_record(root: &Path) -> Result<Option<Record>> {
    let Some(text) = read(root, RECORD)? else { return Ok(None) };
    DeJson::deserialize_json(&text).map(Some).map_err(|why| anyhow!("{RECORD}: {why}: remove it"))
}

fn read(root: &Path, path: &str) -> Result<Option<String>> {
    match fs::read_to_string(below(root, path)) {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
        Err(e) if e.kind() == ErrorKind::NotADirectory => Ok(None),
        text => text.map(Some).with_context(|| path.to_owned()),
    }
}

/// Makes the directories that a file needs, and notes them.
fn directories(root: &Path, path: &str, made: &mut Vec<String>) -> Result<()> {
    let missing: Vec<&Path> =
        Path::new(path).ancestors().skip(1).take_while(|d| !below(root, &d.to_string_lossy()).exists()).collect();
    for directory in missing.into_iter().rev() {
        let name = directory.to_string_lossy().into_owned();
        fs::create_dir(below(root, &name)).with_context(|| name.clone())?;
        if !made.contains(&name) {
            made.push(name);
        }
    }
    Ok(())
}

/// Whole or not at all, with the owner and the mode that it had; a link is followed.
fn write(root: &Path, path: &str, text: &str) -> Result<()> {
    let path = below(root, path);
    let real = path.canonicalize().unwrap_or(path);
    let old = fs::metadata(&real).ok();
    let mut name = real.file_name().unwrap_or_default().to_owned();
    name.push(".weft-new");
    let unfinished = real.with_file_name(name);
    let put = || -> io::Result<()> {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o644).open(&unfinished)?;
        file.write_all(text.as_bytes())?;
        if let Some(old) = old {
            chown(&unfinished, Some(old.uid()), Some(old.gid()))?;
            file.set_permissions(fs::Permissions::from_mode(old.mode() & 0o7777))?;
        }
        file.sync_all()?;
        fs::rename(&unfinished, &real)?;
        File::open(real.parent().unwrap_or(&real))?.sync_all()
    };
    put().inspect_err(|_| drop(fs::remove_file(&unfinished))).with_context(|| real.display().to_string())
}

/// The record, and those directories of ours in which nothing is left.
fn remove(root: &Path, directories: &[String]) -> Result<()> {
    match fs::remove_file(below(root, RECORD)) {
        Err(e) if !matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Err(e).context(RECORD)?,
        Ok(()) | Err(_) => {}
    }
    for directory in directories.iter().rev() {
        // Somebody else uses it by now.
        let _ = fs::remove_dir(below(root, directory));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(root: &Path, undo: bool) -> Order {
        let reverse = vec![plan::network("10.0.0.0/8").unwrap()];
        let wants = Wants { domain: "cluster.local".into(), server: "169.254.96.16:53".parse().unwrap(), reverse };
        Order { wants, undo, root: root.into(), restart: true }
    }

    /// Path, mode and content of all below.
    fn all(root: &Path) -> Vec<(PathBuf, u32, Vec<u8>)> {
        let (mut out, mut todo) = (Vec::new(), vec![root.to_owned()]);
        while let Some(path) = todo.pop() {
            let meta = fs::symlink_metadata(&path).unwrap();
            if meta.is_dir() {
                todo.extend(fs::read_dir(&path).unwrap().map(|e| e.unwrap().path()));
            }
            out.push((path.clone(), meta.mode(), fs::read(&path).unwrap_or_default()));
        }
        out.sort();
        out
    }

    #[test]
    fn undone_is_as_before_on_disk() {
        let root = std::env::temp_dir().join(format!("weft-setup-{}", std::process::id()));
        let file = |path: &str, text: &str, mode: u32| {
            let path = below(&root, path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        };
        fs::create_dir_all(&root).unwrap();
        assert!(run(&order(&root, false)).unwrap()[0].contains("169.254.96.16 the first nameserver"));
        file("/etc/config/dhcp", "config dnsmasq\n\toption x '1'\n", 0o600);
        file("/etc/systemd/resolved.conf", "[Resolve]\n", 0o644);
        std::os::unix::fs::symlink("dhcp", below(&root, "/etc/config/other")).unwrap();
        let before = all(&root);
        let said = run(&order(&root, false)).unwrap();
        assert_eq!(said.len(), 3, "{said:?}");
        let after = all(&root);
        assert_ne!(before, after);
        assert!(is_done(&root));
        assert_eq!(run(&order(&root, false)).unwrap(), ["all is in place already"]);
        assert_eq!(all(&root), after);
        fs::remove_file(below(&root, "/etc/systemd/resolved.conf.d/weft.conf")).unwrap();
        fs::remove_file(below(&root, RECORD)).unwrap();
        fs::rename(below(&root, "/etc/systemd/resolved.conf"), below(&root, "/resolved")).unwrap();
        assert_eq!(run(&order(&root, false)).unwrap(), ["all is in place already"]);
        assert!(is_done(&root), "without its record it is known again");
        fs::rename(below(&root, "/resolved"), below(&root, "/etc/systemd/resolved.conf")).unwrap();
        let made: [&str; 2] = ["/etc/weft", "/etc/systemd/resolved.conf.d"];
        let mut record = read_record(&root).unwrap().unwrap();
        record.directories = made.map(Into::into).into();
        write(&root, RECORD, &record.serialize_json()).unwrap();
        assert_eq!(run(&order(&root, false)).unwrap()[0], "wrote /etc/systemd/resolved.conf.d/weft.conf");
        assert_eq!(all(&root).len(), after.len());
        let said = run(&order(&root, true)).unwrap();
        assert_eq!(said[..2], ["changed /etc/config/dhcp", "removed /etc/systemd/resolved.conf.d/weft.conf"]);
        assert_eq!(all(&root), before);
        assert_eq!(run(&order(&root, true)).unwrap(), ["nothing was there to be undone"]);
        fs::remove_dir_all(&root).unwrap();
    }
}
