//! How quinn-proto is set up: bounds, windows, path MTU discovery and congestion control.

use super::{
    cid::{CID_LEN, CidKey, Generator, HINT_LEN, hint},
    congestion::{Control, Hints},
    datagrams,
    keys::{ResetKey, TokenKey, derive},
    large,
    noise::{Dial, Local, Purpose, Respond, version},
    windows::Windows,
};
use crate::config::Congestion;
use quinn_proto::{
    ClientConfig, ConnectionId, EndpointConfig, IdleTimeout, MtuDiscoveryConfig, ServerConfig, TransportConfig, VarInt,
};
use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

/// Handshakes that wait for us; the next Initials are dropped, and the dialler sends them again.
const INCOMING_MAX: usize = 64;
/// Datagrams that follow an Initial before it was accepted: per handshake, and of all together.
const INCOMING_BYTES: u64 = 4 << 10;
const INCOMING_BYTES_ALL: u64 = 256 << 10;
/// Streams that a peer may have open at first; raised while they are in use, see [`STREAMS_MOST`].
pub(super) const STREAMS_FIRST: u32 = 32;
pub(super) const STREAMS_MOST: u32 = 1024;
/// A connection without any packet from its peer ends after this.
pub(super) const IDLE: Duration = Duration::from_secs(60);
/// What a first packet is given before it is sent again, a third of it: RFC 9002's 333 ms would let one
/// lost Initial cost a second.
/// The odd nanosecond tells it from a measured one.
pub(super) const RTT_FIRST: Duration = Duration::from_nanos(100_000_001);
/// RFC 9000 section 14.1: what every path must carry, a relay's with 13 bytes more.
const MTU_FIRST: u16 = 1200;
/// Ethernet's 1,500 less IPv6 and UDP (48), which is also less than with IPv4, UDP and our relay header (41).
/// Where IPv6, PPPoE or a tunnel leaves less, discovery finds how much.
pub(super) const MTU_MOST: u16 = 1452;
/// A packet is lost when so many later ones, or one later by this part of a round trip, were acknowledged. RFC 9002's 3
/// packets and 9/8 take what radio and multipath deliver late for lost: a tenth of all 10 ms late cost half of 100 Mbit/s.
/// RACK (RFC 8985 section 6.2) waits for 5/4, and for longer where it has seen disorder, without counting packets.
const REORDERED: u32 = 1024;
const LATER: f32 = 1.375;
/// Random bytes of a client's first DCID behind the hint: 16 in all, RFC 9000 section 7.2 asks for 8.
const DCID_LEN: usize = 16;

/// Between stateless resets. After a restart all our peers wait for theirs, and each is no longer than what it answers;
/// with quinn's 20 ms most of those who ask at the same time would not be told.
const RESET_GAP: Duration = Duration::from_millis(1);

/// What every connection of a node shares.
pub(super) struct Transport {
    pub(super) local: Arc<Local>,
    pub(super) respond: Arc<Respond>,
    pub(super) cids: CidKey,
    /// The slot for which quinn will ask connection IDs next.
    pub(super) current: Arc<AtomicU32>,
    server: ServerConfig,
    congestion: Congestion,
    /// Of each stream, for a connection's whole life.
    stream_window: u32,
    dcids: Arc<Mutex<fastrand::Rng>>,
}

impl Transport {
    pub(super) fn new(local: Arc<Local>, stream_window: u32, congestion: Congestion, mut rng: fastrand::Rng) -> Self {
        let root = derive(&local.secret, b"weft cid", b"");
        let token = derive(&local.secret, b"weft token", b"");
        let respond = Arc::new(Respond::new(Arc::clone(&local)));
        let mut server = ServerConfig::new(Arc::clone(&respond) as _, Arc::new(TokenKey(token)));
        server
            // Below us a peer has one virtual address, whatever its path: quinn must see no migration.
            .migration(false)
            .max_incoming(INCOMING_MAX)
            .incoming_buffer_size(INCOMING_BYTES)
            .incoming_buffer_size_total(INCOMING_BYTES_ALL);
        Self {
            respond,
            cids: CidKey::new(&root),
            current: Arc::new(AtomicU32::new(0)),
            server,
            congestion,
            stream_window,
            dcids: Arc::new(Mutex::new(rng.fork())),
            local,
        }
    }

    /// A registration lasts a few packets: nothing is gained by probing its path.
    fn connection(&self, windows: &Windows, hints: &Arc<Hints>, probe_mtu: bool) -> Arc<TransportConfig> {
        let mut mtu = MtuDiscoveryConfig::default();
        mtu.upper_bound(MTU_MOST);
        let mut config = TransportConfig::default();
        config
            .max_concurrent_bidi_streams(STREAMS_FIRST.into())
            .max_concurrent_uni_streams(large::STREAMS_FIRST.into())
            .max_idle_timeout(IdleTimeout::try_from(IDLE).ok())
            .stream_receive_window(self.stream_window.into())
            .receive_window(windows.receive.into())
            .send_window(windows.send.into())
            .initial_rtt(RTT_FIRST)
            .initial_mtu(MTU_FIRST)
            .mtu_discovery_config(probe_mtu.then_some(mtu))
            .datagram_receive_buffer_size(Some(datagrams::BUFFER))
            .datagram_send_buffer_size(datagrams::BUFFER)
            .crypto_buffer_size(4 << 10)
            .packet_threshold(REORDERED)
            .time_threshold(LATER)
            .congestion_controller_factory(Arc::new(Control { choice: self.congestion, hints: Arc::clone(hints) }));
        Arc::new(config)
    }

    pub(super) fn endpoint(&self, rng: &mut fastrand::Rng, seed: Option<[u8; 32]>) -> EndpointConfig {
        let reset = derive(&self.local.secret, b"weft reset", b"");
        let mut config = EndpointConfig::new(Arc::new(ResetKey::new(&reset)));
        let (key, current, rng) = (self.cids.clone(), Arc::clone(&self.current), rng.fork());
        // The gate lets in only the epochs that we hold a psk for.
        config
            .grease_quic_bit(false)
            .min_reset_interval(RESET_GAP)
            .supported_versions((0..=u8::MAX).map(version).collect())
            .rng_seed(seed)
            .cid_generator(move || {
                Box::new(Generator { key: key.clone(), current: Arc::clone(&current), rng: rng.clone() })
            });
        config
    }

    /// For the endpoint, which asks nothing of it but bounds and keys.
    pub(super) fn server(&self) -> Arc<ServerConfig> {
        Arc::new(self.server.clone())
    }

    /// For one connection that is accepted.
    pub(super) fn accepting(&self, windows: &Windows, hints: &Arc<Hints>) -> Arc<ServerConfig> {
        let mut config = self.server.clone();
        config.transport_config(self.connection(windows, hints, true));
        Arc::new(config)
    }

    /// None where we hold no psk.
    pub(super) fn client(&self, dial: Dial, windows: &Windows, hints: &Arc<Hints>) -> Option<ClientConfig> {
        let epoch = self.local.psks.first()?.0;
        let (named, rng) = (hint(&dial.peer), Arc::clone(&self.dcids));
        let transport = self.connection(windows, hints, dial.purpose == Purpose::Peer);
        let mut config = ClientConfig::new(Arc::new(dial));
        config.version(version(epoch)).transport_config(transport).initial_dst_cid_provider(Arc::new(move || {
            let mut dcid = [0; DCID_LEN];
            dcid[..HINT_LEN].copy_from_slice(&named);
            if let Ok(mut rng) = rng.lock() {
                rng.fill(&mut dcid[HINT_LEN..]);
            }
            ConnectionId::new(&dcid)
        }));
        Some(config)
    }

    pub(super) fn serve(&self, slot: u32) {
        self.current.store(slot, Ordering::Relaxed);
    }
}

/// The limit of streams for so many in use: twice as many, within bounds.
pub(super) fn stream_limit(used: usize) -> VarInt {
    let wanted = u32::try_from(used).unwrap_or(STREAMS_MOST).saturating_mul(2);
    wanted.clamp(STREAMS_FIRST, STREAMS_MOST).into()
}

const _: () = assert!(CID_LEN <= 20 && DCID_LEN <= 20);
