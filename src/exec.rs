//! Runs a program of the system with its pipes in the loop: no thread, no signal handler, never a wait
//! that blocks the others.

use crate::reactor::{Async, Timer};
use anyhow::{Context, Result, bail};
use futures_lite::{
    AsyncBufReadExt, AsyncReadExt, AsyncWriteExt,
    future::{or, zip},
    io::{AsyncRead, BufReader},
};
use std::{
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::Duration,
};

/// A program that takes longer is killed: iptables with 10,000 rules takes a second on a slow router.
const PATIENCE: Duration = Duration::from_secs(60);

/// Bytes of an error text that are kept; the rest is read and dropped.
const ERROR_MOST: u64 = 2_048;

/// Bytes of one line of output; a longer one ends the run with an error.
const LINE_MOST: u64 = 64 * 1024;

/// Where programs of the system are besides PATH, which a service manager may not set.
const PLACES: [&str; 4] = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"];

/// The first place where a program of this name is.
#[must_use]
pub fn find(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let places = std::env::split_paths(&path).chain(PLACES.iter().map(PathBuf::from));
    places.filter(|dir| dir.is_absolute()).map(|dir| dir.join(name)).find(|file| file.is_file())
}

/// Kills and reaps a program that is left behind when its future is dropped.
struct Guard(Child);

impl Drop for Guard {
    fn drop(&mut self) {
        if matches!(self.0.try_wait(), Ok(None)) && self.0.kill().is_ok() {
            let _ = self.0.wait();
        }
    }
}

impl Guard {
    /// Its pipes are closed, so it is about to end: looks after 1, 2, 4 … 64 ms.
    async fn ended(&mut self) -> Result<ExitStatus> {
        let mut pause = Duration::from_millis(1);
        loop {
            if let Some(status) = self.0.try_wait()? {
                return Ok(status);
            }
            Timer::after(pause).await;
            pause = (pause * 2).min(Duration::from_millis(64));
        }
    }
}

async fn lines(from: impl AsyncRead + Unpin, mut take: impl FnMut(&str)) -> Result<()> {
    let mut from = BufReader::new(from);
    let mut line = Vec::new();
    loop {
        line.clear();
        let n = (&mut from).take(LINE_MOST).read_until(b'\n', &mut line).await?;
        if n == 0 {
            return Ok(());
        }
        if n as u64 == LINE_MOST && !line.ends_with(b"\n") {
            bail!("it printed a line of more than {LINE_MOST} bytes");
        }
        take(String::from_utf8_lossy(&line).trim_end_matches('\n'));
    }
}

/// The beginning of what it complains about, on one line.
async fn complaint(mut from: impl AsyncRead + Unpin) -> String {
    let mut text = Vec::new();
    let _ = (&mut from).take(ERROR_MOST).read_to_end(&mut text).await;
    let _ = futures_lite::io::copy(from, futures_lite::io::sink()).await;
    let text = String::from_utf8_lossy(&text);
    text.lines().map(str::trim).filter(|l| !l.is_empty()).collect::<Vec<_>>().join("; ")
}

/// Runs a program, gives it `input`, and hands over each line that it prints.
///
/// # Errors
/// When it cannot be started, takes too long or fails; then the text says what it complained about.
pub async fn run(program: &Path, args: &[&str], input: &str, take: impl FnMut(&str)) -> Result<()> {
    let name = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let deadline = Timer::after(PATIENCE);
    let ended = or(communicate(program, args, input, take), async {
        deadline.await;
        bail!("it took longer than {} s and was killed", PATIENCE.as_secs())
    });
    ended.await.context(name)
}

async fn communicate(program: &Path, args: &[&str], input: &str, take: impl FnMut(&str)) -> Result<()> {
    let mut command = Command::new(program);
    command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = Guard(command.spawn().context("cannot be started")?);
    let (Some(stdin), Some(stdout), Some(stderr)) =
        (child.0.stdin.take(), child.0.stdout.take(), child.0.stderr.take())
    else {
        bail!("has no pipes");
    };
    let (mut stdin, stdout, stderr) = (Async::new(stdin)?, Async::new(stdout)?, Async::new(stderr)?);
    let feed = async move {
        // It may end without reading all: then its own words say why.
        let _ = stdin.write_all(input.as_bytes()).await;
    };
    let (printed, ((), complaint)) = zip(lines(stdout, take), zip(feed, complaint(stderr))).await;
    let status = child.ended().await?;
    printed?;
    if status.success() {
        return Ok(());
    }
    if complaint.is_empty() { bail!("{status}") } else { bail!("{complaint}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(script: &str, input: &str) -> (Result<()>, Vec<String>) {
        let mut got = Vec::new();
        let shell = find("sh").unwrap();
        let result = crate::reactor::block_on(run(&shell, &["-c", script], input, |line| got.push(line.to_owned())));
        (result, got)
    }

    #[test]
    fn feeds_reads_and_reaps() {
        let big = "0123456789\n".repeat(50_000);
        let (result, got) = sh("cat; echo last", &big);
        result.unwrap();
        assert_eq!((got.len(), got.last().map(String::as_str)), (50_001, Some("last")));
    }

    #[test]
    fn says_why_it_failed() {
        let (result, _) = sh("echo one >&2; echo >&2; echo two >&2; exit 3", "x");
        assert_eq!(format!("{:#}", result.unwrap_err()), "sh: one; two");
        let (result, _) = sh("exit 3", &"x".repeat(1_000_000));
        assert_eq!(format!("{:#}", result.unwrap_err()), "sh: exit status: 3");
        let missing = crate::reactor::block_on(run(Path::new("/nowhere/tool"), &[], "", |_| ()));
        assert!(format!("{:#}", missing.unwrap_err()).starts_with("tool: cannot be started"));
    }

    #[test]
    fn endless_output_is_bounded() {
        assert!(sh("head -c 100000 /dev/zero", "").0.is_err());
        let (result, _) = sh("head -c 300000 /dev/zero | tr '\\0' x >&2; exit 1", "");
        assert!(format!("{:#}", result.unwrap_err()).len() < 3_000);
    }

    #[test]
    fn a_dropped_run_leaves_no_process() {
        let dir = std::env::temp_dir().join(format!("weft-exec-{}", std::process::id()));
        let script = format!("echo $$ > {}; exec sleep 1000", dir.display());
        let shell = find("sh").unwrap();
        crate::reactor::block_on(or(async { drop(run(&shell, &["-c", &script], "", |_| ()).await) }, async {
            while !std::fs::read_to_string(&dir).is_ok_and(|s| s.ends_with('\n')) {
                Timer::after(Duration::from_millis(5)).await;
            }
        }));
        let pid = std::fs::read_to_string(&dir).unwrap();
        std::fs::remove_file(&dir).unwrap();
        assert!(!Path::new("/proc").join(pid.trim()).exists());
    }
}
