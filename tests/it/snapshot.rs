//! The snapshot on a real disk, by its driver.

use crate::cli::temp_dir;
use futures_lite::future::or;
use std::{
    cell::RefCell,
    fs,
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process::Command,
    rc::Rc,
    time::{Duration, Instant},
};
use weft::{
    clock::{BUILT, Clock},
    disk::{Medium, medium},
    reactor::{Timer, block_on},
    shared::{Reader, Writer},
    snapshot::{Keeper, Leave, Pace, Setup, Status, find},
    table::{
        Table,
        model::{Change, NodeInfo, Object, Source},
    },
};

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
            tunnel: Writer::new(None).reader(),
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
pub(crate) fn what_is_written_is_there_after_a_restart() {
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
pub(crate) fn another_nodes_and_another_clusters_are_not_used_but_their_time_is() {
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
pub(crate) fn a_spoilt_file_is_left_out_and_replaced() {
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

#[test]
fn what_a_directory_is_on_is_what_the_kernel_says() {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let mut seen = 0;
    for line in mounts.lines() {
        let [device, at, kind] = line.splitn(4, ' ').collect::<Vec<_>>()[..3] else { panic!("{line}") };
        // What is mounted over it is seen instead.
        let hidden = mounts.lines().filter(|l| l.split(' ').nth(1) == Some(at)).count() > 1;
        let expected = match kind {
            "tmpfs" | "ramfs" => Medium::Memory,
            "overlay" | "jffs2" | "ubifs" | "f2fs" => Medium::Flash,
            "ext4" | "xfs" | "btrfs" if !device.contains("mmcblk") => Medium::Disk,
            _ => continue,
        };
        if !hidden && Path::new(at).is_dir() {
            assert_eq!(medium(&Path::new(at).join("not/there/yet")), expected, "{line}");
            seen += 1;
        }
    }
    assert!(seen > 0, "no file system that is known here:\n{mounts}");
}
