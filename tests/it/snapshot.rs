//! The snapshot on a real disk: by its driver, and by the executable.

use crate::cli::{TempDir, temp_dir};
use futures_lite::future::{block_on, or};
use smol::Timer;
use std::{
    cell::RefCell,
    fs,
    io::Read as _,
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process::{Child, Command, Stdio},
    rc::Rc,
    time::{Duration, Instant},
};
use weft::{
    clock::{BUILT, Clock},
    shared::{Reader, Writer},
    snapshot::{Keeper, Leave, Pace, Setup, Status, find},
    table::{
        Table,
        model::{Change, NodeInfo, Object, Source},
    },
};

const WEFT: &str = env!("CARGO_BIN_EXE_weft");
const PATIENCE: Duration = Duration::from_secs(20);
const QUICK: Pace = Pace { first: Duration::ZERO, often: Duration::from_millis(2), seldom: Duration::from_millis(2) };

fn put(table: &Writer<Table>, node: &str) {
    let node = NodeInfo { name: node.into(), addresses: vec![[10, 0, 0, 1].into()], zone: None };
    table.update(|t| {
        t.apply(Change::Apply(Source::Manifests, Object::Node(node)));
        t.apply(Change::Complete(Source::Manifests));
    });
}

/// A keeper of its own table, with what was found before.
struct Kept {
    table: Rc<Writer<Table>>,
    status: Reader<Status>,
    leave: Rc<Leave>,
    keeper: RefCell<Option<Keeper>>,
}

impl Kept {
    fn new(directory: &Path, node: &str, cluster: Option<[u8; 32]>, pace: Pace) -> Self {
        let table = Rc::new(Writer::new(Table::default()));
        let restored = find(directory).restore(&table, &[Source::Manifests], node, cluster);
        let setup = Setup {
            directory: directory.into(),
            node: node.into(),
            cluster,
            table: table.reader(),
            tunnel: None,
            clock: Clock::new(BUILT),
            pace,
        };
        let keeper = Keeper::new(setup, &restored).unwrap();
        Self { table, status: keeper.status(), leave: keeper.leave(), keeper: RefCell::new(Some(keeper)) }
    }

    /// Runs the keeper until the other has ended, once.
    fn run(&self, other: impl Future<Output = ()>) {
        let keeper = self.keeper.borrow_mut().take().unwrap();
        let kept = async { keeper.run().await.unwrap() };
        block_on(or(other, async {
            kept.await;
            std::future::pending().await
        }));
    }

    async fn until(&self, what: &str, look: impl Fn(&Status) -> bool) {
        let start = Instant::now();
        while !self.status.read(&look) {
            assert!(start.elapsed_by(PATIENCE), "not within {PATIENCE:?}: {what}");
            Timer::after(Duration::from_millis(1)).await;
        }
    }

    fn has(&self, node: &str) -> bool {
        self.table.update(|t| t.node(node).is_some())
    }
}

trait Within {
    fn elapsed_by(&self, most: Duration) -> bool;
}

impl Within for Instant {
    fn elapsed_by(&self, most: Duration) -> bool {
        Self::now().saturating_duration_since(*self) < most
    }
}

fn is_written(status: &Status) -> bool {
    status.note(Instant::now()).contains("bytes")
}

#[test]
fn what_is_written_is_there_after_a_restart() {
    let dir = temp_dir();
    let state = dir.path().join("a/state");
    let kept = Kept::new(&state, "edge-1", None, QUICK);
    assert!(!kept.table.update(|t| t.synced() && t.nodes().count() > 0));
    put(&kept.table, "old");
    kept.run(async {
        kept.until("a first snapshot", is_written).await;
        put(&kept.table, "new");
        kept.leave.finish().await;
    });
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&state), mode(&state.join("snapshot"))), (0o700, 0o600));
    let names: Vec<_> = fs::read_dir(&state).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names, ["snapshot"], "nothing unfinished is left");

    let again = Kept::new(&state, "edge-1", None, QUICK);
    assert!(again.has("old") && again.has("new"));
    assert!(again.table.update(|t| t.synced()));
    let note = again.status.read(|s| s.note(Instant::now()));
    assert!(note.starts_with("2 objects and 0 peers of 20") && note.contains("not written yet"), "{note}");
}

#[test]
fn nothing_is_written_where_nothing_has_changed() {
    let dir = temp_dir();
    let first = Kept::new(dir.path(), "edge-1", None, QUICK);
    put(&first.table, "old");
    first.run(first.leave.finish());
    let file = dir.path().join("snapshot");
    fs::remove_file(&file).unwrap_or_else(|why| panic!("{}: {why}", file.display()));
    let same = Kept::new(dir.path(), "edge-1", None, QUICK);
    put(&same.table, "old");
    same.run(same.leave.finish());
    assert!(file.exists(), "nothing was there");
    let restored = Kept::new(dir.path(), "edge-1", None, QUICK);
    fs::remove_file(&file).unwrap();
    put(&restored.table, "old");
    restored.run(restored.leave.finish());
    assert!(!file.exists(), "written though it was as before");
}

#[test]
fn a_disk_that_takes_nothing_is_said_and_tried_again() {
    let dir = temp_dir();
    let obstacle = dir.path().join("state");
    fs::write(&obstacle, "a file where the directory should be").unwrap();
    let kept = Kept::new(&obstacle, "edge-1", None, QUICK);
    put(&kept.table, "n");
    kept.run(async {
        kept.until("a complaint", |s| s.trouble.as_ref().is_some_and(|t| t.contains("cannot be written"))).await;
        fs::remove_file(&obstacle).unwrap();
        kept.until("written at last", |s| s.trouble.is_none() && is_written(s)).await;
    });
    assert!(Kept::new(&obstacle, "edge-1", None, QUICK).has("n"));
}

#[test]
fn a_disk_that_hangs_holds_up_nobody_and_the_end_for_two_seconds() {
    let dir = temp_dir();
    let kept = Kept::new(dir.path(), "edge-1", None, QUICK);
    put(&kept.table, "n");
    // Whoever opens it for writing waits for a reader.
    let pipe = dir.path().join("snapshot.new");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let start = Instant::now();
    kept.run(async {
        for _ in 0..20 {
            Timer::after(Duration::from_millis(2)).await;
        }
        assert!(start.elapsed_by(Duration::from_secs(1)), "the loop was blocked");
        kept.leave.finish().await;
    });
    let took = Instant::now() - start;
    assert!((2.0..4.0).contains(&took.as_secs_f64()), "{took:?}");
    fs::File::open(&pipe).unwrap(); // lets the thread go
}

#[test]
fn another_nodes_and_another_clusters_are_not_used_but_their_time_is() {
    let dir = temp_dir();
    let first = Kept::new(dir.path(), "edge-1", Some([1; 32]), QUICK);
    put(&first.table, "n");
    first.run(first.leave.finish());
    for (node, cluster, used) in [
        ("edge-1", Some([1; 32]), true),
        ("edge-2", Some([1; 32]), false),
        ("edge-1", Some([2; 32]), false),
        ("edge-1", None, false),
    ] {
        let kept = Kept::new(dir.path(), node, cluster, QUICK);
        assert_eq!(kept.has("n"), used, "{node} {cluster:?}");
    }
    assert!(find(dir.path()).unix() >= BUILT);
    assert_eq!(find(&dir.path().join("nowhere")).unix(), 0);
}

#[test]
fn a_spoilt_file_is_left_out_and_replaced() {
    let dir = temp_dir();
    let file = dir.path().join("snapshot");
    let first = Kept::new(dir.path(), "edge-1", None, QUICK);
    put(&first.table, "n");
    first.run(first.leave.finish());
    let good = fs::read(&file).unwrap();
    let spoilt: [(&str, Vec<u8>); 5] = [
        ("no snapshot", Vec::new()),
        ("cut", good[..good.len() - 3].to_vec()),
        ("checksum", good.iter().enumerate().map(|(i, b)| if i == good.len() - 2 { b ^ 4 } else { *b }).collect()),
        ("version 7", good.iter().enumerate().map(|(i, b)| if i == 9 { 7 } else { *b }).collect()),
        ("longer than", vec![0; (32 << 20) + 1]),
    ];
    for (why, bytes) in spoilt {
        fs::write(&file, bytes).unwrap();
        let kept = Kept::new(dir.path(), "edge-1", None, QUICK);
        let note = kept.status.read(|s| s.note(Instant::now()));
        assert!(note.contains("is not used") && note.contains(why), "{why}: {note}");
        assert!(!kept.has("n"), "{why}");
        put(&kept.table, "n");
        kept.run(kept.leave.finish());
        assert!(Kept::new(dir.path(), "edge-1", None, QUICK).has("n"), "{why}: replaced");
    }
    fs::remove_file(&file).unwrap();
    fs::create_dir(&file).unwrap();
    let kept = Kept::new(dir.path(), "edge-1", None, QUICK);
    put(&kept.table, "n");
    kept.run(async {
        kept.until("a directory cannot be replaced", |s| s.trouble.is_some()).await;
    });
}

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
            assert!(start.elapsed_by(PATIENCE), "{text}: {}", self.log());
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
fn a_full_disk_keeps_the_old_snapshot_and_hurts_nobody() {
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
