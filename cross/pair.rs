//! Two nodes and their relay as processes over loopback, for `cross/gate`: handshakes, and 1 MiB there and back.
//!
//!     pair make DIR          bundles of all, by a CA of their own
//!     pair relay DIR         prints its port
//!     pair serve DIR PORT    says when it is at the relay; sends back what comes on a stream
//!     pair ask DIR PORT      opens a stream to it, sends, and holds what comes back against what it sent
#![allow(clippy::print_stdout)]

use anyhow::{Context, bail};
use futures_lite::{
    AsyncReadExt, AsyncWriteExt,
    future::{or, zip},
};
use std::{io::Write, net::SocketAddr, path::Path, rc::Rc, time::Duration};
use weft::{
    ca::{self, Ca, Order},
    clock::{BUILT, Clock},
    config::{Config, RelayName},
    metrics::TunnelCounters,
    reactor::{LocalExecutor, Timer},
    table::{
        balance::OnLink,
        model::{Protocol, ServiceId},
    },
    tunnel::{self, Driver, Handle, Open, identity::Roles},
};

const SIZE: usize = 1 << 20;
/// Emulated, and on a machine that does other things too.
const PATIENCE: Duration = Duration::from_secs(300);

fn main() -> anyhow::Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    weft::log::start(log::LevelFilter::Warn);
    match words[..] {
        ["make", dir] => make(Path::new(dir)),
        ["relay", dir] => run(Path::new(dir), "relay", None),
        ["serve", dir, port] => run(Path::new(dir), "serve", Some(port.parse()?)),
        ["ask", dir, port] => run(Path::new(dir), "ask", Some(port.parse()?)),
        _ => bail!("pair make DIR | relay DIR | serve DIR PORT | ask DIR PORT"),
    }
}

fn make(dir: &Path) -> anyhow::Result<()> {
    let ca = Ca::init(&dir.join("ca"))?;
    let now = Clock::new(BUILT).unix();
    for (node, roles) in [("relay", Roles::NONE.with(Roles::RELAY)), ("serve", Roles::NONE), ("ask", Roles::NONE)] {
        let relay = "relay@127.0.0.1:1".parse::<RelayName>().map_err(anyhow::Error::msg)?;
        let order = Order {
            node: node.into(),
            roles,
            network: String::new(),
            days: 1,
            public_key: None,
            relays: if node == "relay" { vec![] } else { vec![relay] },
        };
        let bundle = ca.issue(order, now)?;
        ca.keep(&bundle.certificate)?;
        ca::write_bundle(&dir.join(node), &bundle)?;
    }
    Ok(())
}

fn run(dir: &Path, name: &str, port: Option<u16>) -> anyhow::Result<()> {
    let bundle = ca::read_bundle(&dir.join(name))?;
    let mut config = Config::default().tunnel;
    config.listen = SocketAddr::from(([127, 0, 0, 1], 0));
    config.lan = false;
    config.port_mapping = false;
    if let Some(port) = port {
        config.relays = vec![format!("relay@127.0.0.1:{port}").parse().map_err(anyhow::Error::msg)?];
    }
    let setup = tunnel::Setup {
        name: name.into(),
        bundle,
        key: None,
        is_relay: port.is_none(),
        relay_limits: Config::default().relay.limits,
        mark: 0,
        lookup: Rc::new(|host| Box::pin(async move { bail!("{host} is no address") })),
        clock: Clock::new(BUILT),
        counters: Rc::new(TunnelCounters::default()),
        remembered: Vec::new(),
        on_link: OnLink::default(),
    };
    let (driver, handle) = Driver::bind(&config, setup)?;
    let at = driver.local_addr()?;
    let executor = LocalExecutor::new();
    let driven = executor.spawn(driver.run());
    weft::reactor::block_on(executor.run(or(
        async { driven.await.context("the tunnel has ended") },
        or(
            async {
                match name {
                    "relay" => say(&at.port().to_string()).await,
                    "serve" => serve(&handle).await,
                    _ => ask(&handle).await,
                }
            },
            async {
                Timer::after(PATIENCE).await;
                bail!("not within {PATIENCE:?}; peers: {:?}", handle.peers())
            },
        ),
    )))
}

/// Tells the gate, and lives on until it is ended.
async fn say(text: &str) -> anyhow::Result<()> {
    println!("{text}");
    std::io::stdout().flush()?;
    std::future::pending().await
}

async fn registered(handle: &Handle) {
    while !handle.relays().iter().any(|relay| relay.registered) {
        Timer::after(Duration::from_millis(50)).await;
    }
}

async fn serve(handle: &Handle) -> anyhow::Result<()> {
    registered(handle).await;
    println!("ready");
    std::io::stdout().flush()?;
    loop {
        let (mut stream, _, _) = handle.accept().await;
        stream.answer(&Ok(()));
        let mut bytes = Vec::with_capacity(SIZE);
        // One that was given up is asked for again.
        if stream.read_to_end(&mut bytes).await.is_ok() && stream.write_all(&bytes).await.is_ok() {
            let _ = stream.close().await;
        }
    }
}

/// Emulated, a handshake may take longer than a node waits for it: then once more.
async fn ask(handle: &Handle) -> anyhow::Result<()> {
    registered(handle).await;
    loop {
        match once(handle).await {
            Err(why) if why.is::<std::io::Error>() => log::warn!("{why}; once more"),
            done => return done,
        }
    }
}

async fn once(handle: &Handle) -> anyhow::Result<()> {
    let sent: Vec<u8> = (0..SIZE as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let open = Open {
        service: ServiceId { namespace: "gate".into(), name: "pair".into() },
        port: 1,
        protocol: Protocol::Tcp,
        endpoint: SocketAddr::from(([127, 0, 0, 1], 1)),
    };
    let stream = handle.open("serve", &open);
    let (mut reader, mut writer) = futures_lite::io::split(stream);
    let mut got = Vec::with_capacity(SIZE);
    let write = async {
        writer.write_all(&sent).await?;
        writer.close().await
    };
    let (written, read) = zip(write, reader.read_to_end(&mut got)).await;
    written?;
    read?;
    if got != sent {
        bail!("{} bytes came back, not the {} that were sent", got.len(), sent.len());
    }
    let peer = handle.peers().into_iter().find(|p| p.name == "serve").context("no peer")?;
    println!("{SIZE} bytes there and back, {} path, {} ms", peer.path, peer.rtt_ms.unwrap_or(0));
    Ok(())
}
