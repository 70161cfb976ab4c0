//! Files that are whole or not there, written by a thread of their own: an fsync may take seconds on flash.

use anyhow::{Context as _, ensure};
use async_channel::{Receiver, Sender, bounded};
use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Read as _, Write as _},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    thread,
};

/// The thread's calls are few and shallow.
const STACK: usize = 128 << 10;

/// The whole of a regular file; None where there is none.
///
/// # Errors
/// When it is something else, or longer than `most`, or cannot be read.
pub fn read(path: &Path, most: usize) -> anyhow::Result<Option<Vec<u8>>> {
    // Without O_NONBLOCK the opening of a named pipe would wait for its writer.
    let file = match OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path) {
        Ok(file) => file,
        Err(why) if why.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(why) => return Err(why).context("cannot open it"),
    };
    ensure!(file.metadata()?.is_file(), "it is not a regular file");
    let mut bytes = Vec::new();
    file.take(most as u64 + 1).read_to_end(&mut bytes).context("cannot read it")?;
    ensure!(bytes.len() <= most, "it is longer than {} MiB", most >> 20);
    Ok(Some(bytes))
}

/// Writes one file again and again. Its thread ends with it, unless the disk keeps it.
#[derive(Debug)]
pub struct Writer {
    // Either holds one at most: there is no job before the last one's result.
    jobs: Sender<Vec<u8>>,
    results: Receiver<io::Result<usize>>,
}

impl Writer {
    /// `finish` is what the thread does to the bytes before it writes them.
    ///
    /// # Errors
    /// When there can be no thread.
    pub fn start(path: PathBuf, finish: fn(&mut [u8])) -> io::Result<Self> {
        let (jobs, todo) = bounded::<Vec<u8>>(1);
        let (done, results) = bounded(1);
        let work = move || {
            while let Ok(mut bytes) = todo.recv_blocking() {
                finish(&mut bytes);
                let result = store(&path, &bytes).map(|()| bytes.len());
                drop(bytes);
                if done.send_blocking(result).is_err() {
                    return;
                }
            }
        };
        thread::Builder::new().name("disk".into()).stack_size(STACK).spawn(work)?;
        Ok(Self { jobs, results })
    }

    /// How many bytes were written, or why the file is as it was before.
    ///
    /// # Errors
    /// When the thread is gone.
    pub async fn write(&self, bytes: Vec<u8>) -> anyhow::Result<io::Result<usize>> {
        self.jobs.send(bytes).await.context("the writer has ended")?;
        self.results.recv().await.context("the writer has ended")
    }
}

/// The old file stays whole until the new one is; both are the owner's alone.
fn store(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let directory = path.parent().unwrap_or(path);
    DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    let unfinished = path.with_extension("new");
    let write = || {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&unfinished)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&unfinished, path)
    };
    // A full disk has better use for what was written of it.
    write().inspect_err(|_| drop(fs::remove_file(&unfinished)))?;
    File::open(directory)?.sync_all()
}

/// What a file is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Medium {
    Disk,
    /// Each write wears it out.
    Flash,
    /// A reboot empties it.
    Memory,
}

/// Of the nearest directory that is there. An overlay counts as flash, since a router's is.
#[must_use]
pub fn medium(directory: &Path) -> Medium {
    // linux/magic.h: jffs2, ubifs, overlayfs, f2fs; and tmpfs, ramfs.
    const FLASH: [u32; 4] = [0x72b6, 0x2405_1905, 0x794c_7630, 0xf2f5_2010];
    const MEMORY: [u32; 2] = [0x0102_1994, 0x8584_58f6];
    let Some(there) = directory.ancestors().find(|d| d.exists()) else { return Medium::Disk };
    match rustix::fs::statfs(there).map_or(0, |s| s.f_type as u32) {
        kind if MEMORY.contains(&kind) => Medium::Memory,
        kind if FLASH.contains(&kind) || is_card(there) => Medium::Flash,
        _ => Medium::Disk,
    }
}

/// Whether the device is an SD card or eMMC, whatever file system is on it.
fn is_card(directory: &Path) -> bool {
    let device = fs::metadata(directory).map_or(0, |m| m.dev());
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let block = fs::read_link(format!("/sys/dev/block/{major}:{minor}")).unwrap_or_default();
    block.components().any(|c| c.as_os_str().to_string_lossy().starts_with("mmcblk"))
}
