//! nQUIC: `Noise_IKpsk1` as the handshake of quinn-proto instead of TLS 1.3.
//!
//! ```text
//! Initial   C→S  u16 len | e, es, s, ss, psk { Hello }      Initial  S→C  u16 len | e, ee, se { Hello }
//! Handshake S→C  u16 len | HMAC(fin_s)      Handshake C→S  u16 len | HMAC(fin_c)      then 1-RTT
//! ```
//! quinn-proto needs one packet in the Handshake space from each side: the two Finished are it, and they
//! confirm the keys, which stops replay and key-compromise impersonation. The handshake hash is public and
//! only ever context, never a key. 1-RTT packets are AES's where both Hellos say that their machines have
//! instructions for it, and ChaCha20's else.

use super::{
    frame::Cursor,
    gate::varint,
    identity::{CaPublic, Certificate},
    keys::{KEY_LEN, Key, PacketCipher, TAG_LEN, derive, expand, initial_keys, keys, mac, packet_pair},
    suite,
};
use quinn_proto::{
    ConnectError, ConnectionId, Side, TransportError, TransportErrorCode,
    crypto::{self, ExportKeyingMaterialError, KeyPair, Keys},
    transport_parameters::TransportParameters,
};
use std::{
    any::Any,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
};

const PATTERN: &str = "Noise_IKpsk1_25519_ChaChaPoly_SHA256";
const PROLOGUE: &[u8] = b"weft nquic 1";
/// Not one of the reserved 0x?a?a?a?a (RFC 9000 section 15); the low byte is the psk's epoch, since quinn asks
/// for one set of Initial keys and must be told which psk is meant.
const VERSION: u32 = 0x7765_6600;
/// A handshake message: about 100 bytes of Noise, 100 of transport parameters and a certificate.
const MESSAGE_MAX: usize = 2048;
/// In a Hello's first byte, beside the purpose: the sender has AES in hardware.
const HAS_AES: u8 = 0x80;

/// TLS alert numbers (RFC 8446 section 6), which QUIC carries as error codes.
mod alert {
    pub(super) const UNEXPECTED_MESSAGE: u8 = 10;
    pub(super) const BAD_CERTIFICATE: u8 = 42;
    pub(super) const ACCESS_DENIED: u8 = 49;
    pub(super) const DECODE_ERROR: u8 = 50;
    pub(super) const DECRYPT_ERROR: u8 = 51;
    pub(super) const INTERNAL_ERROR: u8 = 80;
}

pub(super) const fn version(epoch: u8) -> u32 {
    VERSION | epoch as u32
}

/// The psk epoch of a QUIC version of ours.
pub(super) fn epoch(version: u32) -> Option<u8> {
    let [a, b, c, epoch] = version.to_be_bytes();
    let [x, y, z, _] = VERSION.to_be_bytes();
    ((a, b, c) == (x, y, z)).then_some(epoch)
}

/// Why a client dials; the responder decides by it what the connection may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Streams between two nodes.
    Peer,
    /// A node registers at a relay.
    Register,
}

/// What each side says in its Noise payload.
struct Hello {
    parameters: Vec<u8>,
    purpose: Purpose,
    has_aes: bool,
    certificate: Vec<u8>,
}

impl Hello {
    fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(3 + self.parameters.len() + self.certificate.len());
        let purpose = match self.purpose {
            Purpose::Peer => 0,
            Purpose::Register => 1,
        };
        out.push(if self.has_aes { purpose | HAS_AES } else { purpose });
        // quinn's transport parameters are far below 64 KiB; MESSAGE_MAX holds for the whole.
        out.extend_from_slice(&u16::try_from(self.parameters.len()).unwrap_or(u16::MAX).to_be_bytes());
        out.extend_from_slice(&self.parameters);
        out.extend_from_slice(&self.certificate);
        out
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let (purpose, rest) = bytes.split_first()?;
        let (len, rest) = rest.split_first_chunk::<2>()?;
        let (parameters, certificate) = rest.split_at_checked(u16::from_be_bytes(*len).into())?;
        let has_aes = purpose & HAS_AES != 0;
        let purpose = match purpose & !HAS_AES {
            0 => Purpose::Peer,
            1 => Purpose::Register,
            _ => return None,
        };
        Some(Self { parameters: parameters.to_vec(), purpose, has_aes, certificate: certificate.to_vec() })
    }
}

/// What is known of the other end once its certificate has been checked.
#[derive(Clone, Debug)]
pub struct PeerIdentity {
    pub certificate: Certificate,
    /// What the client asked for.
    pub purpose: Purpose,
}

/// Our side of every handshake.
pub struct Local {
    pub secret: Key,
    pub public: [u8; KEY_LEN],
    /// Encoded.
    pub certificate: Vec<u8>,
    pub ca: CaPublic,
    /// (epoch, key), the current one first; at most two.
    pub psks: Vec<(u8, Key)>,
    /// Unix seconds, kept by the node; u32 lasts until 2106.
    pub unix: Arc<AtomicU32>,
    /// A seed makes the ephemeral keys predictable: for simulations alone.
    pub entropy: Option<Mutex<fastrand::Rng>>,
    pub is_relay: bool,
    /// This machine has instructions for AES and GCM.
    pub has_aes: bool,
}

impl Local {
    pub(super) fn psk(&self, epoch: u8) -> Option<&Key> {
        self.psks.iter().find(|(e, _)| *e == epoch).map(|(_, k)| k)
    }

    fn builder<'a>(&'a self, psk: &'a Key) -> Result<snow::Builder<'a>, snow::Error> {
        let seed = self.entropy.as_ref().map(|rng| rng.lock().map_or(0, |mut rng| rng.u64(..)));
        let builder = suite::builder(PATTERN, seed)?;
        builder.local_private_key(&self.secret.0)?.psk(1, &psk.0)?.prologue(PROLOGUE)
    }

    fn check(&self, certificate: &[u8], key: &[u8]) -> Result<Certificate, String> {
        let certificate = Certificate::decode(certificate).map_err(|e| e.to_string())?;
        let now = u64::from(self.unix.load(Ordering::Relaxed));
        certificate.verify(&self.ca, now).map_err(|e| format!("certificate of {}: {e}", certificate.name))?;
        if certificate.key[..] != *key {
            return Err(format!("certificate of {}: it is for another key", certificate.name));
        }
        Ok(certificate)
    }
}

/// A registration is over in a few packets: the relay shall not look for the path's MTU, so it is told that we take no
/// datagram above QUIC's minimum (max_udp_payload_size, RFC 9000 section 18.2).
fn without_mtu_discovery(parameters: &[u8]) -> Vec<u8> {
    const MAX_UDP_PAYLOAD_SIZE: u64 = 3;
    let mut out = vec![MAX_UDP_PAYLOAD_SIZE as u8, 2, 0x44, 0xb0]; // 1,200 as a varint
    let mut rest = Cursor(parameters);
    loop {
        let whole = rest.0;
        let id = varint(&mut rest);
        let value = varint(&mut rest).and_then(|len| rest.take(usize::try_from(len).ok()?));
        match (id, value) {
            (Some(MAX_UDP_PAYLOAD_SIZE), Some(_)) => {}
            (Some(_), Some(_)) => out.extend_from_slice(&whole[..whole.len() - rest.0.len()]),
            (_, None) | (None, _) => return out,
        }
    }
}

/// One dial: whom, and what for.
pub(super) struct Dial {
    pub(super) local: Arc<Local>,
    pub(super) peer: [u8; KEY_LEN],
    /// The name that the peer's certificate must carry.
    pub(super) name: String,
    pub(super) purpose: Purpose,
}

impl crypto::ClientConfig for Dial {
    fn start_session(
        self: Arc<Self>,
        version: u32,
        _server_name: &str,
        parameters: &TransportParameters,
    ) -> Result<Box<dyn crypto::Session>, ConnectError> {
        let psk = epoch(version).and_then(|e| self.local.psk(e)).ok_or(ConnectError::UnsupportedVersion)?.clone();
        let noise = self.local.builder(&psk).and_then(|b| b.remote_public_key(&self.peer)?.build_initiator());
        // An invalid point as the peer's key: the certificate that it came from is useless.
        let noise = noise.map_err(|_| ConnectError::InvalidServerName(self.name.clone()))?;
        Ok(Box::new(Session::new(Role::Client(Arc::clone(&self)), noise, self.peer, psk, parameters)))
    }
}

pub(super) struct Respond {
    local: Arc<Local>,
    /// What the gate has just opened: quinn asks for the same right after, and its keys are most of the cost.
    opened: Mutex<Option<(u32, ConnectionId, Keys)>>,
}

impl Respond {
    pub(super) fn new(local: Arc<Local>) -> Self {
        Self { local, opened: Mutex::new(None) }
    }

    /// Whether we hold the psk of that version's epoch.
    pub(super) fn speaks(&self, version: u32) -> bool {
        epoch(version).and_then(|e| self.local.psk(e)).is_some()
    }

    /// Whether this client's Initial opens; `open` tries.
    pub(super) fn admits(&self, version: u32, dcid: &[u8], open: impl FnOnce(&Keys) -> Option<()>) -> Option<()> {
        let psk = epoch(version).and_then(|e| self.local.psk(e))?;
        let dcid = ConnectionId::new(dcid);
        let keys = initial_keys(&self.local.public, psk, &dcid, Side::Server);
        open(&keys)?;
        if let Ok(mut opened) = self.opened.lock() {
            *opened = Some((version, dcid, keys));
        }
        Some(())
    }
}

impl crypto::ServerConfig for Respond {
    fn initial_keys(&self, version: u32, dcid: &ConnectionId) -> Result<Keys, crypto::UnsupportedVersion> {
        let opened = self.opened.lock().ok().and_then(|mut opened| opened.take());
        if let Some((_, _, keys)) = opened.filter(|(v, id, _)| (*v, id) == (version, dcid)) {
            return Ok(keys);
        }
        let psk = epoch(version).and_then(|e| self.local.psk(e)).ok_or(crypto::UnsupportedVersion)?;
        Ok(initial_keys(&self.local.public, psk, dcid, Side::Server))
    }

    fn retry_tag(&self, version: u32, original: &ConnectionId, packet: &[u8]) -> [u8; 16] {
        let psk = epoch(version).and_then(|e| self.local.psk(e));
        psk.map_or([0; 16], |psk| retry_mac(&self.local.public, psk, original, &[packet]))
    }

    fn start_session(self: Arc<Self>, version: u32, parameters: &TransportParameters) -> Box<dyn crypto::Session> {
        // quinn never comes here with a version that `initial_keys` refused; if it did, the
        // session would fail its first read.
        let psk = epoch(version).and_then(|e| self.local.psk(e)).cloned().unwrap_or(Key([0; KEY_LEN]));
        let noise = self.local.builder(&psk).and_then(snow::Builder::build_responder);
        let mut session = Session::empty(Role::Server(Arc::clone(&self.local)), self.local.public, psk, parameters);
        session.noise = noise.ok().map(Box::new);
        Box::new(session)
    }
}

pub use quinn_proto::crypto::Session as Handshake;

/// Both ends of a handshake, for those who hand over its messages themselves: tests, and fuzzing. None where a key is none.
#[must_use]
pub fn ends(near: Local, far: Local, name: &str, purpose: Purpose) -> Option<[Box<dyn Handshake>; 2]> {
    use quinn_proto::crypto::{ClientConfig, ServerConfig};
    /// initial_max_data, and the initial_source_connection_id that each side must name.
    const PARAMETERS: &[u8] = &[4, 4, 0x80, 0x10, 0, 0, 15, 4, 1, 2, 3, 4];
    let parameters = |side| TransportParameters::read(side, &mut &PARAMETERS[..]).ok();
    let version = version(near.psks.first()?.0);
    let dial = Dial { peer: far.public, local: Arc::new(near), name: name.into(), purpose };
    let client = Arc::new(dial).start_session(version, name, &parameters(Side::Server)?).ok()?;
    Some([client, Arc::new(Respond::new(Arc::new(far))).start_session(version, &parameters(Side::Client)?)])
}

fn retry_mac(responder: &[u8; KEY_LEN], psk: &Key, original: &ConnectionId, parts: &[&[u8]]) -> [u8; 16] {
    let key = super::keys::extract(responder, &[&psk.0, original], b"weft retry");
    let mut out = [0; 16];
    out.copy_from_slice(&mac(&key, parts)[..16]);
    out
}

enum Role {
    Client(Arc<Dial>),
    Server(Arc<Local>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// Client: nothing sent. Server: waiting for message 1.
    Start,
    /// Client: message 1 sent. Server: message 1 read, message 2 to write.
    First,
    /// Client: message 2 read, handshake keys to hand over.
    Second,
    /// Handshake keys installed; Finished to write (the server at once, the client after the server's).
    Finish,
    Done,
}

struct Secrets {
    local: Key,
    remote: Key,
    finished_local: Key,
    finished_remote: Key,
    handshake_local: Key,
    handshake_remote: Key,
    exporter: Key,
}

struct Session {
    role: Role,
    step: Step,
    /// Dropped once split; None from the start where it could not be built.
    noise: Option<Box<snow::HandshakeState>>,
    responder: [u8; KEY_LEN],
    psk: Key,
    parameters: Vec<u8>,
    peer_parameters: Option<Vec<u8>>,
    peer: Option<PeerIdentity>,
    inbox: Vec<u8>,
    secrets: Option<Box<Secrets>>,
    /// Of 1-RTT packets.
    cipher: PacketCipher,
    confirmed: bool,
}

fn fail(alert: u8, reason: impl Into<String>) -> TransportError {
    TransportError { code: TransportErrorCode::crypto(alert), frame: None, reason: reason.into() }
}

impl Session {
    fn new(
        role: Role,
        noise: snow::HandshakeState,
        responder: [u8; KEY_LEN],
        psk: Key,
        p: &TransportParameters,
    ) -> Self {
        let mut session = Self::empty(role, responder, psk, p);
        session.noise = Some(Box::new(noise));
        session
    }

    fn empty(role: Role, responder: [u8; KEY_LEN], psk: Key, parameters: &TransportParameters) -> Self {
        let mut mine = Vec::new();
        parameters.write(&mut mine);
        if matches!(&role, Role::Client(dial) if dial.purpose == Purpose::Register) {
            mine = without_mtu_discovery(&mine);
        }
        Self {
            role,
            step: Step::Start,
            noise: None,
            responder,
            psk,
            parameters: mine,
            peer_parameters: None,
            peer: None,
            inbox: Vec::new(),
            secrets: None,
            cipher: PacketCipher::ChaCha20,
            confirmed: false,
        }
    }

    fn local(&self) -> &Arc<Local> {
        match &self.role {
            Role::Client(dial) => &dial.local,
            Role::Server(local) => local,
        }
    }

    fn is_client(&self) -> bool {
        matches!(self.role, Role::Client(_))
    }

    fn write_noise(&mut self, out: &mut Vec<u8>) {
        let purpose = match &self.role {
            Role::Client(dial) => dial.purpose,
            Role::Server(_) => Purpose::Peer,
        };
        let (certificate, has_aes) = (self.local().certificate.clone(), self.local().has_aes);
        let hello = Hello { parameters: std::mem::take(&mut self.parameters), purpose, has_aes, certificate }.encode();
        let mut message = vec![0; hello.len() + 2 * KEY_LEN + 3 * TAG_LEN];
        // Fails only on a message over 65,535 bytes or out of turn; an empty flight then times out.
        let Some(Ok(len)) = self.noise.as_mut().map(|n| n.write_message(&hello, &mut message)) else { return };
        out.extend_from_slice(&u16::try_from(len).unwrap_or(u16::MAX).to_be_bytes());
        out.extend_from_slice(&message[..len]);
    }

    fn read_noise(&mut self, message: &[u8]) -> Result<(), TransportError> {
        let noise = self.noise.as_mut().ok_or_else(|| fail(alert::INTERNAL_ERROR, "no handshake state"))?;
        let mut plain = vec![0; message.len()];
        let len = noise
            .read_message(message, &mut plain)
            .map_err(|_| fail(alert::DECRYPT_ERROR, "the handshake message does not open"))?;
        let key = noise.get_remote_static().map(<[u8]>::to_vec).unwrap_or_default();
        let hello = Hello::decode(&plain[..len])
            .ok_or_else(|| fail(alert::DECODE_ERROR, "the handshake message is malformed"))?;
        let certificate =
            self.local().check(&hello.certificate, &key).map_err(|why| fail(alert::BAD_CERTIFICATE, why))?;
        match &self.role {
            Role::Client(dial) if certificate.name != dial.name => {
                let why = format!("dialled {}, but {} answered", dial.name, certificate.name);
                return Err(fail(alert::BAD_CERTIFICATE, why));
            }
            Role::Server(local) if hello.purpose == Purpose::Register && !local.is_relay => {
                return Err(fail(alert::ACCESS_DENIED, "this node is not a relay"));
            }
            Role::Client(_) | Role::Server(_) => {}
        }
        if hello.has_aes && self.local().has_aes {
            self.cipher = PacketCipher::Aes128;
        }
        self.peer = Some(PeerIdentity { certificate, purpose: hello.purpose });
        self.peer_parameters = Some(hello.parameters);
        Ok(())
    }

    fn split(&mut self) -> Result<(), TransportError> {
        let mut noise = self.noise.take().ok_or_else(|| fail(alert::INTERNAL_ERROR, "no handshake state"))?;
        let (to_server, to_client) = noise.dangerously_get_raw_split();
        let (to_server, to_client) = (Key(to_server), Key(to_client));
        let hash = noise.get_handshake_hash();
        let (mine, theirs) = if self.is_client() { (&to_server, &to_client) } else { (&to_client, &to_server) };
        self.secrets = Some(Box::new(Secrets {
            local: derive(mine, b"1rtt", hash),
            remote: derive(theirs, b"1rtt", hash),
            finished_local: derive(mine, b"fin", hash),
            finished_remote: derive(theirs, b"fin", hash),
            handshake_local: derive(mine, b"hs", hash),
            handshake_remote: derive(theirs, b"hs", hash),
            exporter: derive(&to_server, b"exp", hash),
        }));
        Ok(())
    }

    fn handshake_keys(&self) -> Option<Keys> {
        let keys = |s: &Secrets| keys(PacketCipher::ChaCha20, &s.handshake_local, &s.handshake_remote);
        self.secrets.as_deref().map(keys)
    }

    fn read_message(&mut self, message: &[u8]) -> Result<bool, TransportError> {
        match (self.is_client(), self.step) {
            (false, Step::Start) => {
                self.read_noise(message)?;
                self.step = Step::First;
                Ok(false)
            }
            (true, Step::First) => {
                self.read_noise(message)?;
                self.split()?;
                self.step = Step::Second;
                Ok(false)
            }
            (true, Step::Finish) | (false, Step::Done) if !self.confirmed => {
                let key = self.secrets.as_ref().map(|s| &s.finished_remote);
                let key = key.ok_or_else(|| fail(alert::INTERNAL_ERROR, "no secrets"))?;
                let expected = mac(key, &[b"finished"]);
                ring_eq(&expected, message).map_err(|()| fail(alert::DECRYPT_ERROR, "Finished does not verify"))?;
                self.confirmed = true;
                Ok(true)
            }
            (_, Step::Start | Step::First | Step::Second | Step::Finish | Step::Done) => {
                Err(fail(alert::UNEXPECTED_MESSAGE, "unexpected handshake message"))
            }
        }
    }
}

/// Constant-time comparison.
fn ring_eq(a: &[u8], b: &[u8]) -> Result<(), ()> {
    let differs = a.len() != b.len() || a.iter().zip(b).fold(0, |acc, (x, y)| acc | (x ^ y)) != 0;
    if differs { Err(()) } else { Ok(()) }
}

impl crypto::Session for Session {
    fn initial_keys(&self, dcid: &ConnectionId, side: Side) -> Keys {
        initial_keys(&self.responder, &self.psk, dcid, side)
    }

    fn handshake_data(&self) -> Option<Box<dyn Any>> {
        None
    }

    fn peer_identity(&self) -> Option<Box<dyn Any>> {
        self.peer.clone().map(|p| Box::new(p) as Box<dyn Any>)
    }

    fn early_crypto(&self) -> Option<(Box<dyn crypto::HeaderKey>, Box<dyn crypto::PacketKey>)> {
        None // IK's first payload can be replayed
    }

    fn early_data_accepted(&self) -> Option<bool> {
        None
    }

    fn is_handshaking(&self) -> bool {
        !self.confirmed
    }

    fn read_handshake(&mut self, bytes: &[u8]) -> Result<bool, TransportError> {
        self.inbox.extend_from_slice(bytes);
        let Some((len, rest)) = self.inbox.split_first_chunk::<2>() else { return Ok(false) };
        let len = usize::from(u16::from_be_bytes(*len));
        if len > MESSAGE_MAX {
            return Err(fail(alert::DECODE_ERROR, "the handshake message is too long"));
        }
        if rest.len() < len {
            return Ok(false);
        }
        if rest.len() > len {
            return Err(fail(alert::UNEXPECTED_MESSAGE, "bytes behind the handshake message"));
        }
        let inbox = std::mem::take(&mut self.inbox);
        self.read_message(&inbox[2..])
    }

    fn transport_parameters(&self) -> Result<Option<TransportParameters>, TransportError> {
        let side = if self.is_client() { Side::Client } else { Side::Server };
        self.peer_parameters
            .as_ref()
            .map(|b| TransportParameters::read(side, &mut &b[..]))
            .transpose()
            .map_err(Into::into)
    }

    /// One call climbs at most one level: quinn files `out` under the level before the keys that it gets back.
    fn write_handshake(&mut self, out: &mut Vec<u8>) -> Option<Keys> {
        match (self.is_client(), self.step) {
            (true, Step::Start) => {
                self.write_noise(out);
                self.step = Step::First;
                None
            }
            (false, Step::First) => {
                self.write_noise(out);
                self.split().ok()?;
                self.step = Step::Finish;
                self.handshake_keys()
            }
            (true, Step::Second) => {
                self.step = Step::Finish;
                self.handshake_keys()
            }
            (client, Step::Finish) if !client || self.confirmed => {
                let secrets = self.secrets.as_ref()?;
                out.extend_from_slice(&[0, 32]);
                out.extend_from_slice(&mac(&secrets.finished_local, &[b"finished"]));
                self.step = Step::Done;
                Some(keys(self.cipher, &secrets.local, &secrets.remote))
            }
            (_, Step::Start | Step::First | Step::Second | Step::Finish | Step::Done) => None,
        }
    }

    fn next_1rtt_keys(&mut self) -> Option<KeyPair<Box<dyn crypto::PacketKey>>> {
        let secrets = self.secrets.as_mut()?;
        secrets.local = derive(&secrets.local, b"ku", b"");
        secrets.remote = derive(&secrets.remote, b"ku", b"");
        Some(packet_pair(self.cipher, &secrets.local, &secrets.remote))
    }

    fn is_valid_retry(&self, original: &ConnectionId, header: &[u8], payload: &[u8]) -> bool {
        let Some((body, tag)) = payload.split_last_chunk::<16>() else { return false };
        ring_eq(&retry_mac(&self.responder, &self.psk, original, &[header, body]), tag).is_ok()
    }

    fn export_keying_material(
        &self,
        out: &mut [u8],
        label: &[u8],
        context: &[u8],
    ) -> Result<(), ExportKeyingMaterialError> {
        let secrets = self.secrets.as_ref().filter(|_| self.confirmed).ok_or(ExportKeyingMaterialError)?;
        let key = derive(&secrets.exporter, label, b"");
        expand(&key.0, &[context], out).map_err(|_| ExportKeyingMaterialError)
    }
}
