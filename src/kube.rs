//! The driver of `[kube] manifests`: reads the files, watches them for changes, and feeds the table.

pub mod access;
pub mod convert;
pub mod files;
mod glob;
pub mod http;
pub mod item;
pub mod json;
mod known;
mod loading;
pub mod resource;
mod store;
pub mod tls;
pub mod types;
pub mod watcher;
pub mod yaml;

pub use loading::{ENDPOINTS_MAX, OBJECTS_MAX};

use crate::sorted::Map;
use crate::{
    clock::Clock,
    reactor::Timer,
    shared::Writer,
    table::{
        Table,
        model::{Change, ObjectId, Source},
    },
};
use anyhow::{Context, bail, ensure};
use files::{Check, Reading};
use futures_lite::future::yield_now;
use loading::{IntoTable, Loading, Wanted};
use std::{
    cell::RefCell,
    fs,
    io::{self, Read as _},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    rc::Rc,
    time::{Duration, Instant},
};

/// How often the files are looked at. A look costs one stat each, and sees what notifications miss: the symlinks by
/// which a ConfigMap is swapped, and network file systems.
const POLL: Duration = Duration::from_secs(1);

/// While no file could be read yet, absent names are unknown and not absent; but a file that stays broken must not
/// keep the rest of the process waiting.
const GRACE: Duration = Duration::from_secs(10);

/// Files used; those beyond, in the order of their paths, are left out with an error.
const FILES_MAX: usize = 256;

/// Entries looked at of one directory; those beyond are not seen, with an error.
const ENTRIES_MAX: usize = 4096;

/// Bytes of one file; a longer one is not read.
const FILE_MAX: u64 = 64 << 20;

/// Read and parsed in one go, in well under a millisecond on a fast machine and a few on a slow one.
const CHUNK: usize = 16 << 10;

/// What `weft status` shows of one source of objects.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SourceStatus {
    /// A file's path, or a pattern that nothing fits.
    pub name: String,
    /// Whether what it holds now is in the table.
    pub synced: bool,
    /// Objects in the table.
    pub objects: usize,
    /// Of kinds that are not read.
    pub skipped: usize,
    /// Since when it is synced or not, where that is known.
    pub since: Option<Instant>,
    /// Empty again once it is mended.
    pub last_error: Option<String>,
}

/// The status of every file, shared with whoever shows it.
#[derive(Clone, Debug, Default)]
pub struct Sources(Rc<RefCell<Vec<SourceStatus>>>);

impl Sources {
    #[must_use]
    pub fn list(&self) -> Vec<SourceStatus> {
        self.0.borrow().clone()
    }
}

/// What tells one content of a file from another without reading it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl From<&fs::Metadata> for Stamp {
    fn from(of: &fs::Metadata) -> Self {
        Self {
            device: of.dev(),
            inode: of.ino(),
            size: of.size(),
            modified: (of.mtime(), of.mtime_nsec()),
            changed: (of.ctime(), of.ctime_nsec()),
        }
    }
}

#[derive(Debug, Default)]
struct File {
    /// None: to be read again.
    stamp: Option<Stamp>,
    /// Of the content that was checked last.
    hash: Option<u64>,
    /// Two writes within one tick of the file system's clock have one stamp: read once more at the next look.
    confirm: bool,
    /// What it named when it could be read last.
    ids: Vec<ObjectId>,
    /// Why the file as a whole cannot be read.
    broken: Option<String>,
    /// The first of its items that could not be read, with the number of the others.
    trouble: Option<String>,
    skipped: usize,
}

impl File {
    /// Notes what a check found; true where the file must be read.
    fn checked(&mut self, path: &Path, outcome: anyhow::Result<u64>) -> bool {
        match outcome {
            Ok(hash) => {
                let mended = self.broken.take().is_some();
                if mended {
                    log::info!("{} can be read again", path.display());
                }
                mended | (self.hash.replace(hash) != Some(hash))
            }
            Err(error) => {
                let text = format!("{}: {error:#}", path.display());
                if self.broken.as_ref() != Some(&text) {
                    log::warn!("{text}{}", if self.ids.is_empty() { "" } else { "; its old content stays" });
                }
                self.broken = Some(text);
                false
            }
        }
    }

    fn error(&self) -> Option<&String> {
        self.broken.as_ref().or(self.trouble.as_ref())
    }
}

/// See the module.
#[derive(Debug)]
pub struct Manifests {
    patterns: Vec<String>,
    table: Rc<Writer<Table>>,
    clock: Clock,
    files: Map<PathBuf, File>,
    /// Patterns and directories that cannot be used, with the reason.
    complaints: Map<String, String>,
    loaded_once: bool,
    /// The table holds what files said before a restart, and not all of them could be read since.
    stale: bool,
    wanted: Wanted,
    sources: Sources,
}

impl Manifests {
    /// From now on the table waits for these files before it is synced. The last component of a pattern may hold `*`.
    #[must_use]
    pub fn new(patterns: &[String], table: Rc<Writer<Table>>, clock: Clock) -> Self {
        if !patterns.is_empty() {
            table.update(|t| t.expect(Source::Manifests));
        }
        let stale = table.update(|t| t.objects(Source::Manifests)) > 0;
        Self {
            patterns: patterns.to_vec(),
            table,
            stale,
            clock,
            files: Map::new(),
            complaints: Map::new(),
            loaded_once: false,
            wanted: Wanted::default(),
            sources: Sources::default(),
        }
    }

    /// Keeps the names of the endpoints' pods, which only a DNS that names endpoints by them needs.
    #[must_use]
    pub fn with_pod_names(mut self, on: bool) -> Self {
        self.wanted.pod_names = on;
        self
    }

    /// Keeps the Pods themselves, which only a DNS that verifies their names needs.
    #[must_use]
    pub fn with_pods(mut self, on: bool) -> Self {
        self.wanted.pods = on;
        self
    }

    /// For `weft status`.
    #[must_use]
    pub fn sources(&self) -> Sources {
        self.sources.clone()
    }

    /// Follows the files for ever.
    ///
    /// # Errors
    /// None so far: a file that cannot be read is an error of that file.
    pub async fn run(mut self) -> anyhow::Result<()> {
        if self.patterns.is_empty() {
            std::future::pending::<()>().await;
        }
        loop {
            self.look().await;
            Timer::after(POLL).await;
        }
    }

    /// One look at the files; reads them all anew if any has changed.
    pub async fn look(&mut self) {
        let (found, complaints) = find(&self.patterns, &self.files);
        let before = self.files.len();
        self.files.retain(|path, _| found.contains_key(path));
        let mut changed = self.files.len() != before;
        for (path, stamp) in found {
            let file = self.files.or_insert_with(path.clone(), Default::default);
            let moved = stamp.is_some() && stamp != file.stamp;
            if moved || std::mem::take(&mut file.confirm) {
                file.confirm = moved;
                file.stamp = stamp;
                changed |= file.checked(&path, check(&path).await);
            }
        }
        for (name, why) in complaints.iter().filter(|(name, why)| self.complaints.get(*name) != Some(*why)) {
            log::warn!("{name}: {why}");
        }
        self.complaints = complaints;
        if changed || !self.loaded_once {
            self.load().await;
        }
        self.show();
    }

    /// One complete list of everything in all files.
    async fn load(&mut self) {
        let started = self.clock.now();
        let version = self.table.update(|t| {
            t.apply(Change::Begin(Source::Manifests));
            t.version()
        });
        let mut kept: Map<ObjectId, usize> = Map::new();
        for (at, (_, file)) in self.files.iter().enumerate().filter(|(_, (_, f))| f.broken.is_some()) {
            kept.extend(file.ids.iter().cloned().map(|id| (id, at)));
        }
        let (mut objects, mut endpoints) = (0, 0);
        for (at, (path, file)) in self.files.iter_mut().enumerate() {
            if file.broken.is_some() {
                objects += file.ids.len();
                self.table.update(|t| {
                    for id in &file.ids {
                        t.apply(Change::Keep(Source::Manifests, id.clone()));
                    }
                });
                continue;
            }
            let mut loading = Loading::new(at, &kept, objects, endpoints, self.wanted);
            let end = read(path, &self.table, &mut loading).await;
            (objects, endpoints) = (loading.objects, loading.endpoints);
            file.ids = loading.ids;
            file.ids.shrink_to_fit();
            file.skipped = loading.skipped;
            let trouble = loading.troubles.summary().map(|text| format!("{}: {text}", path.display()));
            if trouble.is_some() && trouble != file.trouble {
                log::warn!("{}", trouble.as_deref().unwrap_or_default());
            }
            file.trouble = trouble;
            // It was replaced since it was checked: the next look sees to that.
            if end.ok() != file.hash {
                file.stamp = None;
            }
        }
        self.loaded_once |=
            self.files.is_empty() || self.files.values().any(|f| f.broken.is_none()) || self.clock.uptime() >= GRACE;
        // No files at all are files that are not there yet: it takes a list to replace one.
        let unread = |f: &File| f.broken.is_some() && f.ids.is_empty();
        self.stale &= self.files.is_empty() || self.files.values().any(unread);
        let changed = self.table.update(|t| {
            let end = if self.loaded_once && !self.stale { Change::Complete } else { Change::Abort };
            t.apply(end(Source::Manifests));
            t.version() != version
        });
        if changed {
            let took = self.clock.now().saturating_duration_since(started);
            log::info!("{objects} objects in {} files, read in {} ms", self.files.len(), took.as_millis());
            self.table.ring();
        }
    }

    fn show(&self) {
        let of_file = |(path, file): (&PathBuf, &File)| SourceStatus {
            name: path.display().to_string(),
            synced: file.broken.is_none(),
            objects: file.ids.len(),
            skipped: file.skipped,
            since: None,
            last_error: file.error().cloned(),
        };
        let of_complaint = |(name, why): (&String, &String)| SourceStatus {
            name: name.clone(),
            last_error: Some(why.clone()),
            ..SourceStatus::default()
        };
        let list = self.files.iter().map(of_file).chain(self.complaints.iter().map(of_complaint)).collect();
        *self.sources.0.borrow_mut() = list;
    }
}

/// The files that are there, those of before that cannot be looked at (None), and why not.
type Found = (Map<PathBuf, Option<Stamp>>, Map<String, String>);

fn find(patterns: &[String], known: &Map<PathBuf, File>) -> Found {
    let (mut found, mut complaints) = (Map::new(), Map::new());
    let mut directories: Map<&str, Vec<&str>> = Map::new();
    for pattern in patterns {
        let (directory, name) = glob::split(pattern);
        if name.contains('*') {
            directories.or_insert_with(if directory.is_empty() { "." } else { directory }, Default::default).push(name);
        } else if let Err(error) = find_one(Path::new(pattern), known, &mut found) {
            complaints.insert(pattern.clone(), error.to_string());
        }
    }
    for (directory, names) in directories {
        let directory = Path::new(directory);
        if let Err(error) = find_in(directory, &names, known, &mut found) {
            complaints.insert(directory.display().to_string(), format!("{error:#}"));
            if !is_absent(&error) {
                for path in known.keys().filter(|path| path.parent() == Some(directory)) {
                    found.or_insert_with(path.clone(), || None);
                }
            }
        }
    }
    let first = found.keys().nth(FILES_MAX).cloned();
    if let Some(first) = first {
        let beyond = found.split_off(&first).len();
        let why = format!("left out with {} more: more than {FILES_MAX} files", beyond - 1);
        complaints.insert(first.display().to_string(), why);
    }
    (found, complaints)
}

fn find_in(
    directory: &Path,
    names: &[&str],
    known: &Map<PathBuf, File>,
    found: &mut Map<PathBuf, Option<Stamp>>,
) -> io::Result<()> {
    for (seen, entry) in fs::read_dir(directory)?.enumerate() {
        if seen == ENTRIES_MAX {
            return Err(io::Error::other(format!("more than {ENTRIES_MAX} entries: the rest is not seen")));
        }
        let entry = entry?;
        let name = entry.file_name();
        if names.iter().any(|pattern| glob::fits(pattern, &name.to_string_lossy())) {
            // It may vanish at any time.
            find_one(&entry.path(), known, found)
                .or_else(|error| if is_absent(&error) { Ok(()) } else { Err(error) })?;
        }
    }
    Ok(())
}

/// A directory that fits is none of ours.
fn find_one(path: &Path, known: &Map<PathBuf, File>, found: &mut Map<PathBuf, Option<Stamp>>) -> io::Result<()> {
    match fs::metadata(path) {
        Ok(metadata) if metadata.is_dir() => {}
        Ok(metadata) => drop(found.insert(path.to_owned(), Some(Stamp::from(&metadata)))),
        Err(error) => {
            if !is_absent(&error) && known.contains_key(path) {
                found.insert(path.to_owned(), None);
            }
            return Err(error);
        }
    }
    Ok(())
}

/// Gone, and not only out of sight.
fn is_absent(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound
}

/// The first look: whether the file can be used, and its hash.
async fn check(path: &Path) -> anyhow::Result<u64> {
    let mut check = Check::default();
    chunks(path, |bytes| Ok(check.feed(bytes)?)).await?;
    Ok(check.finish()?)
}

/// The second look: everything in the file goes into the table. The hash says whether it was the file that was checked.
async fn read(path: &Path, table: &Writer<Table>, loading: &mut Loading<'_>) -> anyhow::Result<u64> {
    let mut reading = Reading::default();
    chunks(path, |bytes| {
        table.update(|table| reading.feed(bytes, &mut IntoTable { loading: &mut *loading, table }))?;
        Ok(())
    })
    .await?;
    Ok(reading.finish()?)
}

/// A file in chunks; others get their turn between them.
async fn chunks(path: &Path, mut each: impl FnMut(&[u8]) -> anyhow::Result<()>) -> anyhow::Result<()> {
    // Without O_NONBLOCK the opening of a named pipe would wait for its writer.
    let mut file =
        fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path).context("cannot open it")?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        bail!("it is not a regular file");
    }
    let mut chunk = vec![0; CHUNK];
    let mut total = 0;
    loop {
        let n = file.read(&mut chunk).context("cannot read it")?;
        if n == 0 {
            return Ok(());
        }
        total += n as u64;
        ensure!(total <= FILE_MAX, "it is longer than {} MiB", FILE_MAX >> 20);
        each(&chunk[..n])?;
        yield_now().await;
    }
}
