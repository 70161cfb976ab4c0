//! The snapshot on disk: read once at the start, and written when something has changed, but not often.

use crate::{
    clock::Clock,
    disk::{self, Medium},
    reactor::Timer,
    shared::{Bell, Reader, Writer},
    table::{
        Table,
        model::Source,
        snapshot::{self as codec, Encoder, Meta, SNAPSHOT_MAX},
    },
    tunnel::{self, Remembered, identity::utc},
};
use anyhow::Context as _;
use futures_lite::future::{or, yield_now};
use std::{
    cell::Cell,
    path::{Path, PathBuf},
    rc::Rc,
    time::{Duration, Instant},
};

/// After the first start: until the sources have said what there is.
const FIRST: Duration = Duration::from_secs(5);
/// Between two writes on a disk…
const OFTEN: Duration = Duration::from_secs(60);
/// …and on flash, which each write wears out.
const SELDOM: Duration = Duration::from_secs(3_600);
/// Even where nothing else has changed, since a clock that is lost goes on from the time of the snapshot.
const DAILY: u64 = 86_400;
/// At the end the process waits this long for the disk.
const PATIENCE: Duration = Duration::from_secs(2);
const NAME: &str = "snapshot";

/// What a file of before the start gave.
#[derive(Debug)]
pub struct Found(Result<Option<codec::Saved>, String>);

/// What the part of a snapshot that is this node's has given.
#[derive(Debug, Default)]
pub struct Restored {
    pub peers: Vec<Remembered>,
    note: String,
    /// What the file holds, and so need not be written: the table's version, the peers' sum, the time.
    state: Option<State>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct State {
    version: u64,
    peers: u64,
    unix: u64,
}

/// Reads the snapshot; one that cannot be used is said in the log and left as it is.
#[must_use]
pub fn find(directory: &Path) -> Found {
    let path = directory.join(NAME);
    let opened = disk::read(&path, SNAPSHOT_MAX).and_then(|bytes| Ok(bytes.map(codec::open).transpose()?));
    Found(opened.map_err(|why| {
        let why = format!("{} is not used: {why:#}", path.display());
        log::warn!("{why}");
        why
    }))
}

impl Found {
    /// The newest time that is known, for a clock that is not set; of whichever node.
    #[must_use]
    pub fn unix(&self) -> u64 {
        self.0.as_ref().ok().and_then(Option::as_ref).map_or(0, |saved| saved.meta.unix)
    }

    /// Feeds a table with all that it holds, whosever it is.
    pub fn pour(self, table: &Writer<Table>) {
        if let Ok(Some(saved)) = self.0 {
            table.update(|t| saved.restore(t, &[Source::Manifests, Source::Api]));
        }
    }

    /// Feeds the table with the objects of these sources, as lists that are complete and may be stale. Nothing is
    /// taken from another node's snapshot or another cluster's.
    #[must_use]
    pub fn restore(self, table: &Writer<Table>, sources: &[Source], node: &str, cluster: Option<[u8; 32]>) -> Restored {
        let saved = match self.0 {
            Ok(Some(saved)) => saved,
            Ok(None) => return Restored { note: "none was there".into(), ..Restored::default() },
            Err(note) => return Restored { note, ..Restored::default() },
        };
        let (theirs, when) = (&saved.meta, utc(saved.meta.unix));
        if theirs.node != node || theirs.cluster != cluster {
            let whose = if theirs.node == node { "another cluster" } else { "another node" };
            let note = format!("the one of {when} is not used: it is of {whose} ({})", theirs.node);
            log::warn!("{note}");
            return Restored { note, ..Restored::default() };
        }
        let (objects, version) = table.update(|t| (saved.restore(t, sources), t.version()));
        table.ring();
        let note = format!("{objects} objects and {} peers of {when} loaded", saved.peers.len());
        log::info!("{note}");
        let peers = codec::checksum(&codec::encode_peers(&saved.peers));
        Restored { state: Some(State { version, peers, unix: theirs.unix }), peers: saved.peers, note }
    }
}

/// How often it is written. Fields of their own, so that tests need not wait.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    pub first: Duration,
    pub often: Duration,
    pub seldom: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self { first: FIRST, often: OFTEN, seldom: SELDOM }
    }
}

/// What `weft status` shows.
#[derive(Clone, Debug)]
pub struct Status {
    loaded: String,
    written: Option<(Instant, usize)>,
    medium: Medium,
    /// Why the last try to write has failed.
    pub trouble: Option<String>,
}

impl Status {
    #[must_use]
    pub fn note(&self, now: Instant) -> String {
        let written = match self.written {
            Some((at, len)) => {
                format!("written {} s ago, {len} bytes", now.saturating_duration_since(at).as_secs())
            }
            None => "not written yet".into(),
        };
        let pace = match self.medium {
            Medium::Flash => "on flash: at most once an hour",
            Medium::Memory => "in memory: lost at a reboot",
            Medium::Disk => "at most once a minute",
        };
        format!("{}; {written}; {pace}", self.loaded)
    }
}

/// What is to be kept, and where.
pub struct Setup {
    pub directory: PathBuf,
    pub node: String,
    pub cluster: Option<[u8; 32]>,
    pub table: Reader<Table>,
    pub tunnel: Reader<Option<tunnel::Handle>>,
    pub clock: Clock,
    pub pace: Pace,
}

/// The driver.
pub struct Keeper {
    setup: Setup,
    state: Option<State>,
    gap: Duration,
    status: Writer<Status>,
    writer: disk::Writer,
    leave: Rc<Leave>,
}

/// How the end of the process has the last state written.
#[derive(Default)]
pub struct Leave {
    leaving: Cell<bool>,
    bell: Bell,
    left: Bell,
}

impl Leave {
    /// Resolves once the last snapshot is on disk, or after two seconds.
    pub async fn finish(&self) {
        let mut left = self.left.listen();
        self.leaving.set(true);
        self.bell.ring();
        let late = async {
            Timer::after(PATIENCE).await;
            log::warn!("the disk is slow: what has changed last is not in the snapshot");
        };
        or(left.rung(), late).await;
    }
}

impl Keeper {
    /// Starts the writer, which ends with this.
    ///
    /// # Errors
    /// When there can be no thread.
    pub fn new(setup: Setup, restored: &Restored) -> anyhow::Result<Self> {
        let file = setup.directory.join(NAME);
        let writer = disk::Writer::start(file, codec::seal).context("the snapshot's thread")?;
        let medium = disk::medium(&setup.directory);
        let gap = if medium == Medium::Flash { setup.pace.seldom } else { setup.pace.often };
        let status = Writer::new(Status { loaded: restored.note.clone(), written: None, medium, trouble: None });
        Ok(Self { setup, state: restored.state, gap, status, writer, leave: Rc::default() })
    }

    #[must_use]
    pub fn status(&self) -> Reader<Status> {
        self.status.reader()
    }

    #[must_use]
    pub fn leave(&self) -> Rc<Leave> {
        Rc::clone(&self.leave)
    }

    /// Runs until [`Leave::finish`].
    ///
    /// # Errors
    /// When the writer's thread is gone; a disk that takes nothing is only said.
    pub async fn run(mut self) -> anyhow::Result<()> {
        let mut bell = self.leave.bell.listen();
        let mut pause = if self.state.is_some() { self.gap } else { self.setup.pace.first };
        loop {
            let due = async {
                Timer::after(pause).await;
            };
            or(bell.rung(), due).await;
            let leaving = self.leave.leaving.get();
            self.keep().await?;
            if leaving {
                self.leave.left.ring();
                return Ok(());
            }
            pause = self.gap;
        }
    }

    /// Writes what has changed since the last time.
    async fn keep(&mut self) -> anyhow::Result<()> {
        let remembered = self.setup.tunnel.read(|t| t.as_ref().map(tunnel::Handle::remembered)).unwrap_or_default();
        let peers = codec::encode_peers(&remembered);
        let new = State {
            version: self.setup.table.read(Table::version),
            peers: codec::checksum(&peers),
            unix: self.setup.clock.unix(),
        };
        let same = |old: State| {
            old.version == new.version && old.peers == new.peers && new.unix < old.unix.saturating_add(DAILY)
        };
        if self.state.is_some_and(same) {
            return Ok(());
        }
        let bytes = self.encode(new.unix, &peers).await;
        let result = self.writer.write(bytes).await?;
        let (directory, now) = (self.setup.directory.display(), self.setup.clock.now());
        self.status.update(|status| match result {
            Ok(len) => {
                if status.trouble.take().is_some() {
                    log::info!("{directory} takes the snapshot again");
                }
                status.written = Some((now, len));
                self.state = Some(new);
            }
            Err(why) => {
                let trouble = format!("the snapshot cannot be written to {directory}: {why}");
                if status.trouble.as_ref() != Some(&trouble) {
                    log::warn!("{trouble}; it is tried again");
                }
                status.trouble = Some(trouble);
            }
        });
        Ok(())
    }

    async fn encode(&self, unix: u64, peers: &[u8]) -> Vec<u8> {
        let started = self.setup.clock.now();
        let meta = Meta { unix, node: self.setup.node.clone(), cluster: self.setup.cluster };
        let mut encoder = self.setup.table.read(|t| Encoder::new(&meta, peers, t));
        while !self.setup.table.read(|t| encoder.step(t)) {
            yield_now().await;
        }
        let (objects, left_out) = encoder.counts();
        let took = self.setup.clock.now().saturating_duration_since(started);
        log::debug!("{objects} objects, encoded in {:.1} ms", took.as_secs_f64() * 1e3);
        if left_out > 0 {
            log::warn!("{left_out} objects are too large for the snapshot");
        }
        encoder.finish()
    }
}
