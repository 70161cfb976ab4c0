//! The driver of the iptables backend: runs iptables-save and iptables-restore, one transaction for a change set.

use crate::{
    exec, netlink, nft,
    proxy::{
        iptables::{self, Saved},
        rules::Desired,
    },
    rules::Synced,
    sys,
};
use anyhow::{Context, Result, bail};
use std::{
    io::{self, ErrorKind},
    net::{Ipv4Addr, Ipv6Addr, TcpStream},
    ops::Range,
    path::{Path, PathBuf},
    rc::Rc,
};

/// Seconds that iptables waits for its lock.
const LOCK_WAIT: &str = "5";

/// `num_entries` of an `ipt_getinfo`.
const ENTRIES: Range<usize> = 76..80;

/// The tables in which we have rules, and how many entries each has without any: the policy of each built-in chain, and one
/// to end it.
const TABLES: [(&str, u32); 2] = [("nat", 5), ("filter", 4)];

/// How often our jumps are put to the head when kube-proxy's come before them while we write: it starts, too.
const TRIES: usize = 3;

/// What we know of the kernel from the last sync.
#[derive(Debug)]
pub struct Iptables {
    /// For IPv4, and for IPv6 once there is something of it.
    families: [Option<One>; 2],
}

/// One family's.
#[derive(Debug)]
struct One {
    tools: Tools,
    applied: Option<Rc<Desired>>,
    digest: u64,
    rules: usize,
    /// The tables that were not there before us.
    made: Vec<iptables::Kind>,
    /// Of legacy tables, from before they were last listed.
    seen: Option<Sizes>,
}

/// What tells of most changes to legacy tables without running a program: nobody tells us.
#[derive(Debug)]
struct Sizes {
    /// Of the family, and not connected.
    socket: TcpStream,
    found: Box<[sys::TableInfo; 2]>,
}

impl Sizes {
    fn look(socket: &TcpStream) -> io::Result<[sys::TableInfo; 2]> {
        let [nat, filter] = TABLES.map(|(table, _)| sys::table_info(socket, table));
        Ok([nat?, filter?])
    }

    fn now(v4: bool) -> Option<Self> {
        let socket = inet_socket(v4)?;
        let found = Box::new(Self::look(&socket).ok()?);
        Some(Self { socket, found })
    }

    fn changed(&self) -> bool {
        Self::look(&self.socket).is_ok_and(|now| now != *self.found)
    }
}

/// The names of the programs.
const NAMES: [&str; 2] = ["iptables", "ip6tables"];

/// Whether there is an iptables to be run.
#[must_use]
pub fn is_installed() -> bool {
    exec::find("iptables-restore").is_some() && exec::find("iptables-save").is_some()
}

/// Whether somebody uses the tables of iptables-legacy in this network namespace: they stay for ever once somebody has
/// looked at them.
#[must_use]
pub fn has_legacy_tables() -> bool {
    has_legacy_tables_of(true)
}

fn legacy_tables(v4: bool) -> io::Result<String> {
    std::fs::read_to_string(if v4 { "/proc/net/ip_tables_names" } else { "/proc/net/ip6_tables_names" })
}

fn inet_socket(v4: bool) -> Option<TcpStream> {
    let family = if v4 { (Ipv4Addr::UNSPECIFIED, 0).into() } else { (Ipv6Addr::UNSPECIFIED, 0).into() };
    sys::tcp_socket(&family).ok()
}

fn has_legacy_tables_of(v4: bool) -> bool {
    let names = legacy_tables(v4).unwrap_or_default();
    let socket = inet_socket(v4);
    let entries = |table: &str| {
        let info = socket.as_ref().and_then(|socket| sys::table_info(socket, table).ok())?;
        Some(u32::from_ne_bytes(info[ENTRIES].try_into().ok()?))
    };
    // What we may not look into may be in use.
    let in_use = |(table, bare): &(&str, u32)| {
        names.lines().any(|name| name == *table) && entries(table).is_none_or(|count| count > *bare)
    };
    TABLES.iter().any(in_use)
}

impl Iptables {
    /// That variant of iptables whose tables are in use.
    ///
    /// # Errors
    /// When there is no iptables, or it cannot be run.
    pub async fn new() -> Result<Self> {
        Ok(Self { families: [Some(One::new(true).await?), None] })
    }

    /// What it says of itself.
    #[must_use]
    pub fn version(&self) -> &str {
        self.families.iter().flatten().next().map_or("", |one| &one.tools.version)
    }

    /// Whether there are tables of which nobody tells us when they change.
    #[must_use]
    pub fn silent(&self) -> bool {
        self.families.iter().flatten().any(|one| one.seen.is_some())
    }

    /// Whether somebody has added to those tables or taken from them since they were last listed.
    #[must_use]
    pub fn changed(&self) -> bool {
        self.families.iter().flatten().any(|one| one.seen.as_ref().is_some_and(Sizes::changed))
    }

    /// Makes the rules of each family what is desired; None: there are none. Without `look` what was written last counts as
    /// being there.
    ///
    /// # Errors
    /// What iptables complained about; of IPv6 when the rules of IPv4 are in place.
    pub async fn sync(&mut self, desired: &[Option<Rc<Desired>>; 2], look: bool) -> Result<Synced> {
        let mut all = Synced { wrote: false, rules: 0, generation: None };
        for ((slot, desired), v4) in self.families.iter_mut().zip(desired).zip([true, false]) {
            let Some(desired) = desired else {
                if let Some(one) = slot.take() {
                    all.wrote |= one.tools.undo(v4).await?.is_some();
                }
                continue;
            };
            let one = match slot {
                Some(one) => one,
                None => slot.insert(One::new(v4).await?),
            };
            let synced = one.sync(v4, desired, look).await?;
            // The earlier one: what has changed since then may not have been seen.
            let generation = all.generation.or(synced.generation);
            all = Synced { wrote: all.wrote | synced.wrote, rules: all.rules + synced.rules, generation };
        }
        Ok(all)
    }
}

impl One {
    async fn new(v4: bool) -> Result<Self> {
        let name = NAMES[usize::from(!v4)];
        let legacy = if has_legacy_tables_of(v4) { Tools::new(&format!("{name}-legacy")).await.ok() } else { None };
        let tools = match legacy {
            Some(tools) => tools,
            None => Tools::new(name).await?,
        };
        Ok(Self { tools, applied: None, digest: 0, rules: 0, made: Vec::new(), seen: None })
    }

    /// Before the tables are listed: what tells of changes since then.
    fn mark(&mut self, v4: bool) -> Option<u32> {
        self.seen = if self.tools.nft() { None } else { Sizes::now(v4) };
        nft::generation()
    }

    async fn sync(&mut self, v4: bool, desired: &Rc<Desired>, look: bool) -> Result<Synced> {
        let same = self.applied.as_ref() == Some(desired);
        if same && !look {
            return Ok(Synced { wrote: false, rules: self.rules, generation: None });
        }
        let mut generation = self.mark(v4);
        let mut saved = self.tools.save().await?;
        if self.applied.is_some() && saved.digest() != self.digest {
            log::warn!("rules: somebody has changed or flushed ours; they are put back");
        } else if same {
            return Ok(Synced { wrote: false, rules: self.rules, generation });
        }
        self.applied = None;
        let made: Vec<_> = iptables::made(&saved).filter(|kind| !self.made.contains(kind)).collect();
        self.made.extend(made);
        for _ in 0..TRIES {
            self.tools.restore(&iptables::apply(desired, &saved, &self.made)).await?;
            generation = self.mark(v4);
            saved = self.tools.save().await?;
            if !saved.behind() {
                self.digest = saved.digest();
                self.rules = saved.counts().1;
                self.applied = Some(Rc::clone(desired));
                return Ok(Synced { wrote: true, rules: self.rules, generation });
            }
        }
        bail!("somebody puts the jumps to KUBE-SERVICES before ours as often as we put ours before them");
    }
}

/// Whether iptables would take a rule such as ours: it is made, and not put in place.
///
/// # Errors
/// What iptables complained about.
pub async fn attempt() -> Result<()> {
    const RULES: &str = "*nat\n:WEFT-CHECK - [0:0]\n-A WEFT-CHECK -p tcp -d 192.0.2.1/32 --dport 1 \
                         -j DNAT --to-destination 192.0.2.2:1\nCOMMIT\n";
    let tools = One::new(true).await?.tools;
    exec::run(&tools.restore, &["--noflush", "--test"], RULES, |_| ()).await
}

/// What the programs that are called iptables are: "nf_tables" or "legacy"; None: there are none.
#[must_use]
pub fn flavour() -> Option<&'static str> {
    let program = exec::find("iptables-restore")?;
    let real = program.canonicalize().unwrap_or(program);
    Some(if real.to_string_lossy().contains("nft") { "nf_tables" } else { "legacy" })
}

/// Removes what is ours from every variant of iptables that is installed. Says what it removed, and what failed.
pub async fn remove() -> (Vec<String>, Vec<String>) {
    let (mut done, mut errors) = (Vec::new(), Vec::new());
    let mut seen: Vec<(PathBuf, bool, bool)> = Vec::new();
    for (name, variant) in NAMES.iter().flat_map(|name| ["", "-nft", "-legacy"].map(|variant| (*name, variant))) {
        let v4 = name == NAMES[0];
        // Each variant has tables of its own; the default one is one of them under a second name.
        let Ok(tools) = Tools::new(&format!("{name}{variant}")).await else { continue };
        let real = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
        let id = (real(&tools.restore), tools.nft(), v4);
        // Root alone may read the list, whatever the capabilities: another user has made no such rules, and cannot look.
        let denied = !tools.nft() && matches!(legacy_tables(v4), Err(e) if e.kind() == ErrorKind::PermissionDenied);
        if denied || seen.contains(&id) {
            continue;
        }
        seen.push(id);
        match tools.undo(v4).await {
            Ok(what) => done.extend(what),
            Err(e) => errors.push(format!("{e:#}")),
        }
    }
    (done, errors)
}

#[derive(Clone, Debug)]
struct Tools {
    restore: PathBuf,
    save: PathBuf,
    /// What it says of itself.
    version: String,
    wait: bool,
}

/// The words of `iptables-restore v1.8.9 (nf_tables)`; a number that is missing counts as 0.
fn version_of(line: &str) -> Option<[u16; 3]> {
    let text = line.split(' ').find_map(|word| word.strip_prefix('v'))?;
    let mut numbers = text.split('.').map(|n| n.parse().unwrap_or(0));
    Some([numbers.next()?, numbers.next()?, numbers.next().unwrap_or(0)])
}

impl Tools {
    /// `family` is "iptables" or "ip6tables", or one of their variants.
    async fn new(family: &str) -> Result<Self> {
        let find = |what: &str| {
            let name = format!("{family}-{what}");
            exec::find(&name).with_context(|| format!("{name} is not installed (the package is called iptables)"))
        };
        let (restore, save) = (find("restore")?, find("save")?);
        let mut version = String::new();
        let mut first = |line: &str| {
            if version.is_empty() {
                line.clone_into(&mut version);
            }
        };
        exec::run(&restore, &["--version"], "", &mut first).await?;
        // Since 1.6.2 iptables-restore waits for the lock where it is told to.
        let wait = version_of(&version).is_some_and(|v| v >= [1, 6, 2]);
        Ok(Self { restore, save, version, wait })
    }

    fn nft(&self) -> bool {
        self.version.contains("nf_tables")
    }

    async fn save(&self) -> Result<Saved> {
        let mut saved = Saved::default();
        exec::run(&self.save, &[], "", |line| saved.line(line)).await?;
        Ok(saved)
    }

    async fn restore(&self, text: &str) -> Result<()> {
        let args: &[&str] = if self.wait { &["--noflush", "-w", LOCK_WAIT] } else { &["--noflush"] };
        exec::run(&self.restore, args, text, |_| ()).await
    }

    /// Takes our rules away; None: there were none.
    async fn undo(&self, v4: bool) -> Result<Option<String>> {
        let saved = match self.save().await {
            // A kernel without IPv6 has nothing of ours in it.
            Err(e) if !v4 => {
                log::debug!("{e:#}");
                return Ok(None);
            }
            saved => saved?,
        };
        let Some(text) = iptables::undo(&saved) else { return Ok(None) };
        let remains = iptables::remains(&saved);
        self.restore(&text).await?;
        if self.nft() {
            for part in remains {
                // Somebody may have begun to use it: then it stays, and is theirs.
                if let Err(e) = self.restore(&part.text).await {
                    log::debug!("table {}: {e:#}", part.table);
                }
                if let Err(e) = netlink::remove_empty_table(v4, part.table) {
                    log::debug!("table {}: {e:#}", part.table);
                }
            }
        }
        let (chains, rules) = saved.counts();
        Ok(Some(format!("{chains} chains and {rules} rules ({})", self.version)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_tool_is_named() {
        let missing = crate::reactor::block_on(Tools::new("no-such-tables")).unwrap_err();
        assert!(missing.to_string().starts_with("no-such-tables-restore is not installed"), "{missing}");
    }

    #[test]
    fn versions() {
        assert_eq!(version_of("iptables-restore v1.8.9 (nf_tables)"), Some([1, 8, 9]));
        assert_eq!(version_of("iptables-restore v1.6"), Some([1, 6, 0]));
        assert_eq!(version_of("busybox"), None);
    }
}
