//! Two nodes as two processes over loopback, for `cross/gate`: a handshake, and 1 MiB there and back.
//!
//!     pair make DIR          bundles of both, by a CA of their own
//!     pair serve DIR         prints its port; sends back what comes on each stream
//!     pair ask DIR PORT      opens a stream to it, sends, and holds what comes back against what it sent
#![allow(clippy::print_stdout)]

use anyhow::{Context, bail};
use futures_lite::{AsyncReadExt, AsyncWriteExt, future::zip};
use smol::{LocalExecutor, Timer, future::or};
use std::{io::Write, net::SocketAddr, path::Path, rc::Rc, time::Duration};
use weft::{
    ca::{self, Ca, Order},
    clock::{BUILT, Clock},
    config::{Config, RelayName},
    metrics::TunnelCounters,
    table::model::{Protocol, ServiceId},
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
        ["serve", dir] => run(Path::new(dir), None),
        ["ask", dir, port] => run(Path::new(dir), Some(port.parse()?)),
        _ => bail!("pair make DIR | serve DIR | ask DIR PORT"),
    }
}

fn make(dir: &Path) -> anyhow::Result<()> {
    let ca = Ca::init(&dir.join("ca"))?;
    let now = Clock::new(BUILT).unix();
    for (node, roles) in [("far", Roles::NONE.with(Roles::RELAY)), ("near", Roles::NONE)] {
        let order = Order {
            node: node.into(),
            roles,
            network: String::new(),
            days: 1,
            public_key: None,
            relays: if node == "near" {
                vec!["far@127.0.0.1:1".parse::<RelayName>().map_err(anyhow::Error::msg)?]
            } else {
                vec![]
            },
        };
        let bundle = ca.issue(order, now)?;
        ca.keep(&bundle.certificate)?;
        ca::write_bundle(&dir.join(node), &bundle)?;
    }
    Ok(())
}

fn run(dir: &Path, port: Option<u16>) -> anyhow::Result<()> {
    let name = if port.is_some() { "near" } else { "far" };
    let bundle = ca::read_bundle(&dir.join(name))?;
    let mut config = Config::default().tunnel;
    config.listen = SocketAddr::from(([127, 0, 0, 1], 0));
    config.lan = false;
    config.port_mapping = false;
    if let Some(port) = port {
        config.relays = vec![format!("far@127.0.0.1:{port}").parse().map_err(anyhow::Error::msg)?];
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
    };
    let (driver, handle) = Driver::bind(&config, setup)?;
    let at = driver.local_addr()?;
    let executor = LocalExecutor::new();
    let driven = executor.spawn(driver.run());
    smol::block_on(executor.run(or(
        async { driven.await.context("the tunnel has ended") },
        or(
            async {
                if port.is_some() {
                    return ask(&handle).await;
                }
                println!("{}", at.port());
                std::io::stdout().flush()?;
                serve(&handle).await
            },
            async {
                Timer::after(PATIENCE).await;
                bail!("not within {PATIENCE:?}; peers: {:?}", handle.peers())
            },
        ),
    )))
}

async fn serve(handle: &Handle) -> anyhow::Result<()> {
    let (mut stream, peer, open) = handle.accept().await;
    println!("{peer} opens {}/{}", open.service.namespace, open.service.name);
    stream.answer(&Ok(()));
    let mut bytes = Vec::with_capacity(SIZE);
    stream.read_to_end(&mut bytes).await?;
    stream.write_all(&bytes).await?;
    stream.close().await?;
    // Until the other end has it all, and goes.
    std::future::pending().await
}

async fn ask(handle: &Handle) -> anyhow::Result<()> {
    let sent: Vec<u8> = (0..SIZE as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let open = Open {
        service: ServiceId { namespace: "gate".into(), name: "pair".into() },
        port: 1,
        protocol: Protocol::Tcp,
        endpoint: SocketAddr::from(([127, 0, 0, 1], 1)),
    };
    let stream = handle.open("far", &open);
    let (mut reader, mut writer) = smol::io::split(stream);
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
    let peer = handle.peers().into_iter().find(|p| p.name == "far").context("no peer")?;
    println!("{SIZE} bytes there and back, {} path, {} ms", peer.path, peer.rtt_ms.unwrap_or(0));
    Ok(())
}
