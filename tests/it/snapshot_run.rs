//! The snapshot of the executable: restarts, files that are away, a disk that is full.

use crate::cli::{TempDir, temp_dir};
use std::{
    fs,
    io::Read as _,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

const WEFT: &str = env!("CARGO_BIN_EXE_weft");
const PATIENCE: Duration = Duration::from_secs(20);

/// `weft run` with Services of one manifest.
struct Run {
    child: Child,
    socket: String,
}

fn manifest(dir: &TempDir, services: &[&str]) {
    let item = |name: &&str| {
        format!(
            r#"{{"apiVersion":"v1","kind":"Service","metadata":{{"name":"{name}","namespace":"shop"}},
             "spec":{{"clusterIP":"None","ports":[{{"port":80}}]}}}}"#
        )
    };
    let items: Vec<String> = services.iter().map(item).collect();
    let text = format!(r#"{{"apiVersion":"v1","kind":"List","items":[{}]}}"#, items.join(","));
    fs::write(dir.path().join("new"), text).unwrap();
    fs::rename(dir.path().join("new"), dir.path().join("shop.json")).unwrap();
}

impl Run {
    /// `before`: what the shell does first.
    fn start(dir: &TempDir, before: &str) -> Self {
        let at = |name: &str| dir.path().join(name).display().to_string();
        let config = format!(
            "dns.enable = false\nproxy.enable = false\ntunnel.enable = false\nnode.name = \"edge-1\"\n\
             node.state_dir = \"{}\"\nadmin.socket = \"{}\"\nkube.manifests = [\"{}\"]\n",
            at("state"),
            at("sock"),
            at("shop.json")
        );
        fs::write(at("weft.toml"), config).unwrap();
        let child = Command::new("sh")
            .args(["-c", &format!("{before} exec \"$0\" run --config \"$1\""), WEFT, &at("weft.toml")])
            .env("WEFT_LOG", "debug")
            .stderr(Stdio::piped())
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        Self { child, socket: at("sock") }
    }

    /// What it has said, to its end.
    fn log(&mut self) -> String {
        let _ = self.child.kill();
        let mut text = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut text).unwrap();
        text
    }

    /// What `weft services --json` says, once it fits.
    fn services(&mut self, fits: impl Fn(&str) -> bool) -> String {
        let start = Instant::now();
        loop {
            let out = Command::new(WEFT).args(["services", "--json", "--socket", &self.socket]).output().unwrap();
            let text = String::from_utf8(out.stdout).unwrap();
            if out.status.success() && fits(&text) {
                return text;
            }
            assert!(self.child.try_wait().unwrap().is_none(), "ended: {}", self.log());
            assert!(Instant::now() < start + PATIENCE, "{text}: {}", self.log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// By SIGTERM; its log.
    fn stop(mut self) -> String {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").arg(&pid).status().unwrap().success());
        let status = self.child.wait().unwrap();
        let log = self.log();
        assert!(status.success(), "{log}");
        log
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn the_agent_knows_after_a_restart_what_files_that_are_not_there_yet_said() {
    let dir = temp_dir();
    manifest(&dir, &["one", "two"]);
    let mut run = Run::start(&dir, "");
    run.services(|s| s.contains("\"one\"") && s.contains("\"two\""));
    run.stop();
    fs::remove_file(dir.path().join("shop.json")).unwrap();

    let mut run = Run::start(&dir, "");
    run.services(|s| s.contains("\"one\"") && s.contains("\"two\""));
    fs::write(dir.path().join("shop.json"), "{").unwrap();
    run.services(|s| s.contains("\"one\"") && s.contains("\"two\""));
    manifest(&dir, &["two", "three"]);
    run.services(|s| !s.contains("\"one\"") && s.contains("\"three\""));
    let log = run.stop();
    assert!(log.contains("2 objects and 0 peers of"), "{log}");

    let mut run = Run::start(&dir, "");
    let seen = run.services(|s| s.contains("\"three\""));
    assert!(!seen.contains("\"one\""), "{seen}");
    run.stop();
}

#[test]
pub(crate) fn a_full_disk_keeps_the_old_snapshot_and_hurts_nobody() {
    let dir = temp_dir();
    manifest(&dir, &["one"]);
    let mut run = Run::start(&dir, "");
    run.services(|s| s.contains("\"one\""));
    run.stop();
    let file = dir.path().join("state/snapshot");
    let old = fs::read(&file).unwrap();

    manifest(&dir, &["one", "two"]);
    // Files may not grow: every write fails with EFBIG.
    let mut run = Run::start(&dir, "trap '' XFSZ; ulimit -f 0;");
    run.services(|s| s.contains("\"two\""));
    let log = run.stop();
    assert!(log.contains("the snapshot cannot be written to") && log.contains("File too large"), "{log}");
    assert!(fs::read(&file).unwrap() == old, "the old one is as it was");
    assert!(!dir.path().join("state/snapshot.new").exists(), "what was written of the new one is gone");

    let mut run = Run::start(&dir, "");
    run.services(|s| s.contains("\"two\""));
    run.stop();
    assert!(fs::read(&file).unwrap() != old, "and with room it is written");
}
