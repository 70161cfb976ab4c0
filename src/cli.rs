//! The subcommands. Each writes through one writer that a closed pipe ends quietly.

mod args;
pub mod self_test;
mod show;

use crate::encoding::BASE64;
use crate::{
    admin::{self, render, view},
    app,
    ca::{self, Ca, Order},
    check,
    clock::{BUILT, Clock},
    config::{Config, LoadError},
    log,
    proxy::cover::Prefix,
    setup,
    tunnel::identity::{Certificate, Roles, utc},
};
use anyhow::{Context, bail};
use argh::FromArgs;
use args::{Args, CaCommand, CaIssue, CaShow, Command};
use nanoserde::{DeJson, SerJson};
use std::{
    io::{self, IsTerminal, Write},
    net::Ipv4Addr,
    path::Path,
    process::ExitCode,
    time::Duration,
};

/// Bad usage.
const USAGE: u8 = 2;
/// sysexits.h, `EX_USAGE`: what linkerd gives for a configuration that is wrong.
const CONFIG: u8 = 64;

/// How often `--watch` asks.
const WATCH_EVERY: Duration = Duration::from_secs(1);

/// Does what the command line says. Errors are printed here.
#[must_use]
pub fn main(argv: &[String]) -> ExitCode {
    let args: Vec<&str> = argv.iter().skip(1).map(String::as_str).collect();
    let command = match Args::from_args(&["weft"], &args) {
        Ok(args) => args.command,
        Err(exit) => {
            return match exit.status {
                Ok(()) => code(out(exit.output.trim_end())),
                Err(()) => {
                    complain(&format!("{}\n`weft --help` tells more", exit.output.trim_end()));
                    USAGE.into()
                }
            };
        }
    };
    code(run(command))
}

fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Run(run) => start(run),
        Command::Status(c) => query(&c.socket, "status", c.json, render::status),
        Command::Peers(c) => query(&c.socket, "peers", c.json, render::peers),
        Command::Services(c) => {
            let request = format!("services {}", c.name.unwrap_or_default());
            query(&c.socket, request.trim_end(), c.json, render::services)?;
            if c.watch { watch(&c.socket, request.trim_end(), c.json) } else { Ok(()) }
        }
        Command::Resolve(c) => resolve(&c),
        Command::Check(c) => check(c),
        Command::Setup(c) => setup(c),
        Command::Ca(c) => match c.command {
            CaCommand::Init(c) => init(&c.dir),
            CaCommand::Issue(c) => issue(c),
            CaCommand::Show(c) => show(&c),
        },
        Command::Cleanup(c) => cleanup(&c.socket),
        Command::Version(c) => version(&c),
    }
}

fn start(run: args::Run) -> anyhow::Result<()> {
    let asked = log::level_asked(run.log.as_deref()).map_err(Usage)?;
    let config = loaded(run.config.as_deref())?;
    log::start(asked.unwrap_or(config.node.log));
    app::run(app::Start { config, file: run.config, bundle: run.bundle, log: asked })
}

fn loaded(file: Option<&Path>) -> Result<Config, LoadError> {
    file.map_or_else(|| Ok(Config::default()), Config::load)
}

fn check(c: args::Check) -> anyhow::Result<()> {
    log::start(::log::LevelFilter::Off);
    let report = check::run(loaded(c.config.as_deref())?, c.bundle);
    out(&if c.json { report.serialize_json() } else { report.text() })?;
    match report.failed {
        0 => Ok(()),
        1 => bail!("1 check failed"),
        failed => bail!("{failed} checks failed"),
    }
}

fn setup(c: args::Setup) -> anyhow::Result<()> {
    let dns = loaded(c.config.as_deref())?.dns;
    let reverse = if c.reverse.is_empty() { vec![Prefix::new(Ipv4Addr::new(10, 0, 0, 0), 8)] } else { c.reverse };
    let wants = setup::plan::Wants { domain: dns.domain, server: dns.listen, reverse };
    out(&setup::run(&setup::Order { wants, undo: c.undo, root: c.root, restart: !c.no_restart })?.join("\n"))
}

fn cleanup(socket: &Path) -> anyhow::Result<()> {
    log::start(::log::LevelFilter::Warn);
    if admin::is_answered(socket) {
        bail!("an agent is at work ({} answers): end it first, and it cleans up by itself", socket.display());
    }
    let removed = app::cleanup()?;
    out(&if removed.is_empty() {
        "nothing was left".to_owned()
    } else {
        format!("removed {}", removed.join("\nremoved "))
    })
}

fn query<T: DeJson>(socket: &Path, request: &str, json: bool, render: impl Fn(&T) -> String) -> anyhow::Result<()> {
    let (reply, view) = admin::ask::<T>(socket, request)?;
    out(if json { reply } else { render(&view) }.trim_end())
}

/// Prints again whenever there is something else to tell, until nobody reads it or the agent has gone.
fn watch(socket: &Path, request: &str, json: bool) -> anyhow::Result<()> {
    let mut last = None;
    let home = if io::stdout().is_terminal() { "\x1b[H\x1b[2J" } else { "\n" };
    loop {
        let (reply, view) = admin::ask::<view::Services>(socket, request)?;
        let text = if json { reply } else { render::services(&view) };
        if last.is_some() && last.as_ref() != Some(&text) {
            let home = if json { "" } else { home };
            if io::stdout().write_all(format!("{home}{}\n", text.trim_end()).as_bytes()).is_err() {
                return Ok(());
            }
        }
        last = Some(text);
        std::thread::sleep(WATCH_EVERY);
    }
}

/// Fails, after it has printed, where there is no such name: scripts ask for that.
fn resolve(c: &args::Resolve) -> anyhow::Result<()> {
    let (reply, view) = admin::ask::<view::Resolution>(&c.socket, &format!("resolve {}", c.name))?;
    if c.json {
        out(&reply)?;
    } else if view.code == "NOERROR" {
        out(render::resolution(&view).trim_end())?;
    }
    match view.code.as_str() {
        "NOERROR" => Ok(()),
        _ => bail!("{}", render::resolution(&view).trim_end()),
    }
}

fn init(dir: &Path) -> anyhow::Result<()> {
    let ca = Ca::init(dir)?;
    out(&format!(
        "made a CA in {}\npublic key {}\nWho has this directory can make nodes: keep it where no gateway is.",
        dir.display(),
        BASE64.encode(&ca.public().0)
    ))
}

fn issue(c: CaIssue) -> anyhow::Result<()> {
    let ca = Ca::open(&c.dir)?;
    let now = Clock::new(BUILT).unix();
    let before = ca.certificate(&c.node)?.filter(|old| old.not_after >= now);
    let path = c.out.unwrap_or_else(|| format!("{}.bundle", c.node).into());
    let bundle = ca.issue(
        Order {
            node: c.node,
            roles: c.role.into_iter().fold(Roles::NONE, Roles::with),
            network: c.network,
            days: c.days,
            public_key: c.public_key,
            relays: c.relay,
        },
        now,
    )?;
    ca::write_bundle(&path, &bundle)?;
    ca.keep(&bundle.certificate)?;

    let Certificate { name, not_after, .. } = &bundle.certificate;
    let mut text = format!("wrote {}: {name} until {}", path.display(), utc(*not_after));
    if let Some(old) = before {
        text += &format!("\nAn older certificate of {name} stays good until {}.", utc(old.not_after));
    }
    if bundle.key.is_none() {
        text += "\nOn the node, fill in its line private_key.";
    }
    if bundle.relays.is_empty() && !bundle.certificate.roles.contains(Roles::RELAY) {
        text += "\nIt names no relay (--relay name@host:port): behind a NAT the node will find nobody.";
    }
    out(&text)
}

fn show(c: &CaShow) -> anyhow::Result<()> {
    let now = Clock::new(BUILT).unix();
    if let Some(file) = &c.file {
        let bundle = ca::read_bundle(file)?;
        return out(&show::bundle(&bundle, now, c.json));
    }
    let ca = Ca::open(&c.dir)?;
    out(&show::authority(&ca.public(), ca.epochs(), &ca.issued()?, now, c.json))
}

#[derive(SerJson)]
struct ShownVersion {
    version: String,
    target: String,
    self_test: Option<Vec<ShownTest>>,
}

#[derive(SerJson)]
struct ShownTest {
    name: String,
    ok: bool,
    note: String,
}

fn version(c: &args::Version) -> anyhow::Result<()> {
    let rng = ring::rand::SystemRandom::new();
    let tests = c.self_test.then(|| {
        let shown = |(name, result): (&str, anyhow::Result<()>)| ShownTest {
            name: name.into(),
            ok: result.is_ok(),
            note: result.err().map_or_else(String::new, |e| format!("{e:#}")),
        };
        self_test::run(&rng).map(shown).collect::<Vec<_>>()
    });
    let failed = tests.iter().flatten().filter(|t| !t.ok).count();
    let endian = if cfg!(target_endian = "big") { "big-endian" } else { "little-endian" };
    let shown = ShownVersion {
        version: env!("CARGO_PKG_VERSION").into(),
        target: format!("{}-{}, {endian}", std::env::consts::ARCH, std::env::consts::OS),
        self_test: tests,
    };
    if c.json {
        out(&shown.serialize_json())?;
    } else {
        let mut text = format!("weft {} ({})", shown.version, shown.target);
        for t in shown.self_test.iter().flatten() {
            text += &format!("\n{:<20} {}{}", t.name, if t.ok { "ok" } else { "FAILED: " }, t.note);
        }
        out(&text)?;
    }
    if failed > 0 {
        bail!("{failed} self-tests failed");
    }
    Ok(())
}

/// Prints to stdout, with a newline. A reader that has seen enough is no error.
fn out(text: &str) -> anyhow::Result<()> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(format!("{text}\n").as_bytes()).and_then(|()| stdout.flush()) {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => Err(e).context("cannot write to stdout"),
        Ok(()) | Err(_) => Ok(()),
    }
}

fn complain(text: &str) {
    // Nowhere is left to report a failure to.
    let _ = io::stderr().lock().write_all(format!("weft: {text}\n").as_bytes());
}

/// A value on the command line, or in the environment, that argh does not check.
#[derive(Debug)]
struct Usage(String);

impl std::fmt::Display for Usage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

fn code(result: anyhow::Result<()>) -> ExitCode {
    let Err(error) = result else { return ExitCode::SUCCESS };
    complain(&format!("{error:#}"));
    if error.is::<LoadError>() {
        CONFIG.into()
    } else if error.is::<Usage>() {
        USAGE.into()
    } else {
        ExitCode::FAILURE
    }
}
