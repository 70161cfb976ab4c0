//! How quinn-proto is set up: bounds, windows and congestion control by profile.

use super::{
    cid::{CID_LEN, CidKey, Generator, HINT_LEN, hint},
    keys::{ResetKey, TokenKey, derive},
    noise::{Dial, Local, Respond, version},
};
use crate::config::{Congestion, Profile};
use quinn_proto::{
    ClientConfig, ConnectionId, EndpointConfig, IdleTimeout, MtuDiscoveryConfig, ServerConfig, TransportConfig, VarInt,
    congestion,
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
const RTT_FIRST: Duration = Duration::from_millis(100);
/// RFC 9000 section 14.1: what every path must carry.
const MTU_FIRST: u16 = 1200;
/// Ethernet's 1,500 less IPv4 and UDP (28) and our relay header (13), rounded down.
const MTU_MOST: u16 = 1452;
/// Random bytes of a client's first DCID behind the hint: 16 in all, RFC 9000 section 7.2 asks for 8.
const DCID_LEN: usize = 16;

/// What every connection of a node shares.
pub(super) struct Transport {
    pub(super) local: Arc<Local>,
    pub(super) cids: CidKey,
    /// The slot for which quinn will ask connection IDs next.
    pub(super) current: Arc<AtomicU32>,
    common: Arc<TransportConfig>,
    dcids: Arc<Mutex<fastrand::Rng>>,
}

struct Windows {
    stream: u32,
    connection: u32,
    send: u64,
}

/// design.md 6.1: below 1 GB of RAM, and above.
fn windows(profile: Profile) -> Windows {
    match profile {
        Profile::Auto | Profile::Router => Windows { stream: 512 << 10, connection: 768 << 10, send: 768 << 10 },
        Profile::Server => Windows { stream: 1 << 20, connection: 8 << 20, send: 8 << 20 },
    }
}

impl Transport {
    pub(super) fn new(local: Arc<Local>, profile: Profile, congestion: Congestion, mut rng: fastrand::Rng) -> Self {
        let Windows { stream, connection, send } = windows(profile);
        let mut mtu = MtuDiscoveryConfig::default();
        mtu.upper_bound(MTU_MOST);
        let mut common = TransportConfig::default();
        common
            .max_concurrent_bidi_streams(STREAMS_FIRST.into())
            .max_concurrent_uni_streams(0_u32.into())
            .max_idle_timeout(IdleTimeout::try_from(IDLE).ok())
            .stream_receive_window(stream.into())
            .receive_window(connection.into())
            .send_window(send)
            .initial_rtt(RTT_FIRST)
            .initial_mtu(MTU_FIRST)
            .mtu_discovery_config(Some(mtu))
            .datagram_receive_buffer_size(None)
            .crypto_buffer_size(4 << 10);
        match congestion {
            // Every connection begins on a relay, and there BBR is worth a factor of 27 at 1 % loss.
            Congestion::Auto | Congestion::Bbr => {
                common.congestion_controller_factory(Arc::new(congestion::BbrConfig::default()))
            }
            Congestion::Cubic => common.congestion_controller_factory(Arc::new(congestion::CubicConfig::default())),
        };
        let root = derive(&local.secret, b"weft cid", b"");
        Self {
            cids: CidKey::new(&root),
            current: Arc::new(AtomicU32::new(0)),
            common: Arc::new(common),
            dcids: Arc::new(Mutex::new(rng.fork())),
            local,
        }
    }

    pub(super) fn endpoint(&self, rng: &mut fastrand::Rng, seed: Option<[u8; 32]>) -> EndpointConfig {
        let reset = derive(&self.local.secret, b"weft reset", b"");
        let mut config = EndpointConfig::new(Arc::new(ResetKey::new(&reset)));
        let (key, current, rng) = (self.cids.clone(), Arc::clone(&self.current), rng.fork());
        // The gate lets in only the epochs that we hold a psk for.
        config
            .grease_quic_bit(false)
            .supported_versions((0..=u8::MAX).map(version).collect())
            .rng_seed(seed)
            .cid_generator(move || {
                Box::new(Generator { key: key.clone(), current: Arc::clone(&current), rng: rng.clone() })
            });
        config
    }

    pub(super) fn server(&self) -> ServerConfig {
        let token = derive(&self.local.secret, b"weft token", b"");
        let mut config = ServerConfig::new(Arc::new(Respond(Arc::clone(&self.local))), Arc::new(TokenKey(token)));
        config
            .transport_config(Arc::clone(&self.common))
            // Below us a peer has one virtual address, whatever its path: quinn must see no migration.
            .migration(false)
            .max_incoming(INCOMING_MAX)
            .incoming_buffer_size(INCOMING_BYTES)
            .incoming_buffer_size_total(INCOMING_BYTES_ALL);
        config
    }

    /// None where we hold no psk.
    pub(super) fn client(&self, dial: Dial) -> Option<ClientConfig> {
        let epoch = self.local.psks.first()?.0;
        let (named, rng) = (hint(&dial.peer), Arc::clone(&self.dcids));
        let mut config = ClientConfig::new(Arc::new(dial));
        config.version(version(epoch)).transport_config(Arc::clone(&self.common)).initial_dst_cid_provider(Arc::new(
            move || {
                let mut dcid = [0; DCID_LEN];
                dcid[..HINT_LEN].copy_from_slice(&named);
                if let Ok(mut rng) = rng.lock() {
                    rng.fill(&mut dcid[HINT_LEN..]);
                }
                ConnectionId::new(&dcid)
            },
        ));
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
