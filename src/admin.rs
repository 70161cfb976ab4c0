//! The admin socket: one line asks, JSON answers, and the connection is closed. And its client.

pub mod health;
pub mod render;
pub mod report;
pub mod resolve;
pub mod view;

use crate::{
    clock::Clock,
    config::Policy,
    metrics::{DnsCounters, ProxyCounters, TunnelCounters},
    reactor::{Async, LocalExecutor, Timer},
    shared::Reader,
    table::{
        Table,
        balance::{Fared, Here, PortId},
    },
    tunnel,
};
use anyhow::{Context, bail};
use async_lock::Semaphore;
use futures_lite::{AsyncReadExt, AsyncWriteExt, future::or};
use nanoserde::{DeJson, SerJson};
use std::{
    cell::RefCell,
    collections::BTreeMap,
    fs::{self, DirBuilder, Permissions},
    io::{self, Read, Write},
    net::SocketAddr,
    os::unix::{
        fs::{DirBuilderExt, MetadataExt, PermissionsExt},
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    rc::Rc,
    sync::Arc,
    time::Duration,
};

/// Clients at once; more wait in the kernel's queue, and none keeps its place longer than [`PATIENCE`].
const CLIENTS_MAX: usize = 8;
/// A command and a name; a longer line is refused.
const REQUEST_MAX: usize = 512;
/// For the whole of a conversation; a client that is slower is left.
const PATIENCE: Duration = Duration::from_secs(10);
/// After an accept failed: no descriptors are left.
const ACCEPT_AGAIN: Duration = Duration::from_millis(200);
/// 5,000 Services take 2 MB; a longer answer is not the agent's.
const REPLY_MAX: u64 = 64 << 20;

/// How an endpoint of a Service's port has fared.
pub type HowFared = dyn Fn(&PortId, SocketAddr) -> Option<Fared>;

/// What the socket can tell; each part that is switched off is None.
pub struct Views {
    pub node: String,
    pub clock: Clock,
    pub table: Reader<Table>,
    pub tunnel: Option<tunnel::Handle>,
    pub dns_counters: Option<Rc<DnsCounters>>,
    pub proxy_counters: Option<Rc<ProxyCounters>>,
    pub tunnel_counters: Option<Rc<TunnelCounters>>,
    pub sources: Box<dyn Fn() -> Vec<view::Source>>,
    pub parts: Box<dyn Fn() -> Vec<view::Part>>,
    pub warnings: Box<dyn Fn() -> Vec<String>>,
    pub resolve: Box<dyn Fn(&str) -> view::Resolution>,
    /// Where no DestinationRule says another.
    pub policy: Policy,
    pub here: Here,
    pub fared: Box<HowFared>,
    /// What is wrong, in a line; None: all is well.
    pub unwell: Box<dyn Fn() -> Option<String>>,
}

/// The place where the agent is asked: taken first of all, for it tells that no other agent is at work here.
pub struct Socket {
    listener: Async<UnixListener>,
    _file: SocketFile,
}

impl Socket {
    /// Listens at `path`, which only the owner may use; takes the place of a socket that nobody answers any more.
    ///
    /// # Errors
    /// When another agent answers there, or the socket cannot be made.
    pub fn bind(path: &Path) -> anyhow::Result<Self> {
        let (listener, file) = listen(path).with_context(|| format!("admin socket {}", path.display()))?;
        Ok(Self { listener: Async::new(listener)?, _file: file })
    }
}

/// Whether an agent answers at `path`.
#[must_use]
pub fn is_answered(path: &Path) -> bool {
    UnixStream::connect(path).is_ok()
}

/// The server.
pub struct Admin {
    socket: Socket,
    views: Shown,
}

/// What the socket tells now.
pub type Shown = Rc<RefCell<Rc<Views>>>;

impl Admin {
    #[must_use]
    pub fn new(socket: Socket, views: Views) -> Self {
        Self { socket, views: Rc::new(RefCell::new(Rc::new(views))) }
    }

    /// Where other views may be put.
    #[must_use]
    pub fn shown(&self) -> Shown {
        Rc::clone(&self.views)
    }

    /// Serves for ever. The socket's file goes when this is dropped.
    ///
    /// # Errors
    /// Never.
    pub async fn run(self) -> anyhow::Result<()> {
        let tasks = LocalExecutor::new();
        let places = Arc::new(Semaphore::new(CLIENTS_MAX));
        tasks
            .run(async {
                loop {
                    let place = places.acquire_arc().await;
                    let Ok((client, _)) = self.socket.listener.accept().await else {
                        Timer::after(ACCEPT_AGAIN).await;
                        continue;
                    };
                    let views = Rc::clone(&self.views.borrow());
                    let talk = async move {
                        let _place = place;
                        or(serve(client, &views), async {
                            Timer::after(PATIENCE).await;
                        })
                        .await;
                    };
                    tasks.spawn(talk).detach();
                }
            })
            .await
    }
}

async fn serve(mut client: Async<UnixStream>, views: &Views) {
    let Some(request) = request(&mut client).await else { return };
    // A client that has gone away wants no answer.
    let _ = client.write_all(views.answer(&request).as_bytes()).await;
}

/// Up to the first newline or the end.
async fn request(client: &mut Async<UnixStream>) -> Option<String> {
    let mut bytes = [0; REQUEST_MAX];
    let mut len = 0;
    while len < REQUEST_MAX && !bytes[..len].contains(&b'\n') {
        match client.read(&mut bytes[len..]).await.ok()? {
            0 => break,
            n => len += n,
        }
    }
    let line = bytes[..len].split(|b| *b == b'\n').next()?;
    Some(String::from_utf8_lossy(line).trim().to_owned())
}

impl Views {
    /// The answer to one line: a command, and a name where it takes one.
    #[must_use]
    pub fn answer(&self, request: &str) -> String {
        let (command, name) = request.split_once(' ').map_or((request, ""), |(c, n)| (c, n.trim()));
        match (command, name) {
            ("status", "") => self.status().serialize_json(),
            ("peers", "") => self.peers().serialize_json(),
            ("services", "") => self.table.read(|t| report::services(t, &self.proxied())).serialize_json(),
            ("services", name) => {
                let found = self.table.read(|t| report::named(t, name, &self.proxied()));
                if found.services.is_empty() { failure(&format!("no service {name}")) } else { found.serialize_json() }
            }
            ("resolve", name) if !name.is_empty() => (self.resolve)(name).serialize_json(),
            _ => failure("expected: status, peers, services [NAME], or resolve NAME"),
        }
    }

    fn proxied(&self) -> report::Proxied<'_> {
        report::Proxied { policy: self.policy, here: &self.here, fared: &*self.fared }
    }

    fn status(&self) -> view::Status {
        let (services, endpoints, nodes) = self.table.read(report::counts);
        let mut counters = BTreeMap::new();
        let mut count = |(name, _, value): (&str, &str, u64)| {
            counters.insert(name.to_owned(), value);
        };
        self.dns_counters.iter().for_each(|c| c.each().for_each(&mut count));
        self.proxy_counters.iter().for_each(|c| c.each().for_each(&mut count));
        self.tunnel_counters.iter().for_each(|c| c.each().for_each(&mut count));
        view::Status {
            version: env!("CARGO_PKG_VERSION").into(),
            node: self.node.clone(),
            pid: std::process::id(),
            uptime_secs: self.clock.uptime().as_secs(),
            synced: self.table.read(Table::synced),
            sources: (self.sources)(),
            services,
            endpoints,
            nodes,
            parts: (self.parts)(),
            relays: self.tunnel.iter().flat_map(tunnel::Handle::relays).map(Into::into).collect(),
            nat: self.tunnel.as_ref().map_or_else(String::new, tunnel::Handle::nat),
            relaying: self.tunnel.as_ref().and_then(tunnel::Handle::relay_load).map(Into::into),
            peers: self.tunnel.iter().flat_map(tunnel::Handle::peers).filter(|p| p.path != "none").count(),
            counters,
            warnings: (self.warnings)().into_iter().chain(self.table.read(report::rules)).collect(),
        }
    }

    fn peers(&self) -> view::Peers {
        view::Peers { peers: self.tunnel.iter().flat_map(tunnel::Handle::peers).map(Into::into).collect() }
    }
}

impl From<tunnel::PeerView> for view::Peer {
    fn from(p: tunnel::PeerView) -> Self {
        let tunnel::PeerView {
            name,
            path,
            via,
            rtt_ms,
            congestion,
            mtu,
            since_secs,
            streams,
            tx_bytes,
            rx_bytes,
            note,
        } = p;
        let (path, congestion) = (path.into(), congestion.into());
        Self { name, path, via, rtt_ms, congestion, mtu, since_secs, streams, tx_bytes, rx_bytes, note }
    }
}

impl From<tunnel::RelayLoad> for view::Relaying {
    fn from(l: tunnel::RelayLoad) -> Self {
        let tunnel::RelayLoad { nodes, firsts, flows, queued, datagrams, bytes, drops } = l;
        let drops = drops.into_iter().map(|(why, n)| (why.to_owned(), n)).collect();
        Self { nodes, firsts: firsts.into(), flows, queued_bytes: queued, datagrams, bytes, drops }
    }
}

impl From<tunnel::RelayView> for view::Relay {
    fn from(r: tunnel::RelayView) -> Self {
        let tunnel::RelayView { name, address, registered, rtt_ms, note } = r;
        Self { name, address, registered, rtt_ms, note }
    }
}

fn failure(error: &str) -> String {
    view::Failure { error: error.into() }.serialize_json()
}

/// Takes the socket's file away again, if it is still the one that we made.
struct SocketFile {
    path: PathBuf,
    inode: (u64, u64),
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if inode(&self.path).is_ok_and(|i| i == self.inode) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn inode(path: &Path) -> io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|m| (m.dev(), m.ino()))
}

fn listen(path: &Path) -> anyhow::Result<(UnixListener, SocketFile)> {
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or_else(|| Path::new("."));
    DirBuilder::new().recursive(true).mode(0o755).create(parent)?;
    if is_answered(path) {
        bail!("another agent answers there");
    }
    if fs::symlink_metadata(path).is_ok_and(|m| m.mode() & libc::S_IFMT != libc::S_IFSOCK) {
        bail!("there is something else than a socket");
    }
    // Made where nobody else can reach it, and moved in place with its final mode.
    let nursery = parent.join(format!(".weft{}", std::process::id()));
    let _ = fs::remove_dir_all(&nursery);
    DirBuilder::new().mode(0o700).create(&nursery)?;
    let made = nursery.join("s");
    let bound = UnixListener::bind(&made).and_then(|listener| {
        fs::set_permissions(&made, Permissions::from_mode(0o600))?;
        fs::rename(&made, path)?;
        Ok((listener, SocketFile { path: path.into(), inode: inode(path)? }))
    });
    let _ = fs::remove_dir_all(&nursery);
    Ok(bound?)
}

/// Asks the agent, and waits.
///
/// # Errors
/// When no agent answers at `path`, with the remedy; or with what the agent says against the question.
pub fn ask<T: DeJson>(path: &Path, request: &str) -> anyhow::Result<(String, T)> {
    let mut agent = UnixStream::connect(path).map_err(|e| {
        let shown = path.display();
        anyhow::anyhow!(match e.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused =>
                format!("no agent answers at {shown}: start it with `weft run`, or name its socket with --socket"),
            io::ErrorKind::PermissionDenied =>
                format!("{shown}: permission denied; ask as the user that runs the agent"),
            _ => format!("{shown}: {e}"),
        })
    })?;
    let talk = |agent: &mut UnixStream| -> io::Result<String> {
        agent.set_read_timeout(Some(PATIENCE))?;
        agent.set_write_timeout(Some(PATIENCE))?;
        agent.write_all(format!("{}\n", request.replace('\n', " ")).as_bytes())?;
        let mut reply = String::new();
        agent.take(REPLY_MAX).read_to_string(&mut reply)?;
        Ok(reply)
    };
    let reply = talk(&mut agent).with_context(|| format!("the agent at {} gave no answer", path.display()))?;
    if let Ok(view::Failure { error }) = DeJson::deserialize_json(&reply) {
        bail!(error);
    }
    let read = T::deserialize_json(&reply)
        .with_context(|| format!("the agent at {} answered what this weft cannot read", path.display()))?;
    Ok((reply, read))
}
