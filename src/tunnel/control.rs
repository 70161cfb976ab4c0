//! Relay control (0x12): sealed messages between a node and a relay where it is registered.
//!
//! `0x12 | registration u64 | cookie u64 | counter u64 | ChaCha20-Poly1305(message)`. The registration's
//! secret is the exporter of the one handshake that made it. The cookie is the relay's mark on the
//! registration: after a restart it knows by it that a registration was its own and may say that it is
//! gone (a frame without a message), while strangers get nothing.

mod message;

pub(super) use message::{Control, Entry, Rank, RelayAt};

use super::{
    frame::{Cursor, RELAY_CONTROL, TagKey},
    keys::{Aead, Key, TAG_LEN, derive},
};

/// First byte, registration, cookie, counter.
pub(super) const CONTROL_HEADER: usize = 25;
/// The largest message holds a few numbers and three certificates, of which one with a name of 20 letters has 130
/// bytes; a frame is to fit where QUIC's least datagram does.
const MESSAGE_MAX: usize = 1150;

/// What arrived in a control frame, before it is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) registration: u64,
    pub(super) cookie: u64,
    pub(super) counter: u64,
    /// No message at all: the registration is gone.
    pub(super) bare: bool,
}

pub(super) fn parse_header(frame: &[u8]) -> Option<Header> {
    let mut c = Cursor(frame.get(1..)?);
    Some(Header { registration: c.u64()?, cookie: c.u64()?, counter: c.u64()?, bare: c.0.is_empty() })
}

/// Says that a registration is gone.
pub(super) fn bare(registration: u64, cookie: u64) -> Vec<u8> {
    let mut out = vec![RELAY_CONTROL];
    out.extend_from_slice(&registration.to_be_bytes());
    out.extend_from_slice(&cookie.to_be_bytes());
    out.extend_from_slice(&u64::MAX.to_be_bytes());
    out
}

/// Accepts each counter once, and none that is more than 63 behind the highest (as RFC 4303 section 3.4.3).
#[derive(Clone, Debug, Default)]
struct Window {
    top: u64,
    seen: u64,
}

impl Window {
    fn accept(&mut self, counter: u64) -> bool {
        if counter > self.top {
            let ahead = counter - self.top;
            self.seen = if ahead < 64 { self.seen << ahead } else { 0 } | 1;
            self.top = counter;
            return true;
        }
        let bit = self.top - counter;
        let fresh = bit < 64 && self.seen & (1 << bit) == 0;
        if fresh {
            self.seen |= 1 << bit;
        }
        fresh
    }
}

/// One end of a registration: seals, opens, tags.
pub(super) struct Channel {
    pub(super) registration: u64,
    pub(super) cookie: u64,
    seal: Aead,
    open: Aead,
    /// For frames that we send.
    pub(super) tag_out: TagKey,
    /// For frames that we receive.
    pub(super) tag_in: TagKey,
    sent: u64,
    window: Window,
}

impl Channel {
    /// `secret` is the exporter of the handshake; both ends derive the same registration from it.
    pub(super) fn new(secret: &Key, is_relay: bool, cookie: u64) -> Self {
        let (out, inn) = if is_relay { ("down", "up") } else { ("up", "down") };
        let named = |part: &str, way: &str| format!("{part} {way}").into_bytes();
        let mut id = [0; 8];
        id.copy_from_slice(&derive(secret, b"registration", b"").0[..8]);
        Self {
            registration: u64::from_be_bytes(id),
            cookie,
            seal: Aead::new(&derive(secret, &named("control", out), b"")),
            open: Aead::new(&derive(secret, &named("control", inn), b"")),
            tag_out: TagKey::new(secret, &named("data", out)),
            tag_in: TagKey::new(secret, &named("data", inn)),
            sent: 0,
            window: Window::default(),
        }
    }

    /// A whole frame.
    pub(super) fn seal(&mut self, message: &Control) -> Vec<u8> {
        self.sent += 1;
        let mut out = vec![RELAY_CONTROL];
        out.extend_from_slice(&self.registration.to_be_bytes());
        out.extend_from_slice(&self.cookie.to_be_bytes());
        out.extend_from_slice(&self.sent.to_be_bytes());
        let mut body = message.encode();
        match self.seal.seal(nonce(self.sent), &out, &mut body) {
            Ok(tag) => {
                out.extend_from_slice(&body);
                out.extend_from_slice(&tag);
            }
            Err(_) => out.clear(),
        }
        out
    }

    /// None where it does not open, was seen before, or is no message that we know.
    pub(super) fn open(&mut self, frame: &[u8]) -> Option<Control> {
        let header = parse_header(frame)?;
        let sealed = frame.get(CONTROL_HEADER..).filter(|s| (TAG_LEN..=MESSAGE_MAX + TAG_LEN).contains(&s.len()))?;
        let mut body = sealed.to_vec();
        let len = self.open.open(nonce(header.counter), &frame[..CONTROL_HEADER], &mut body).ok()?;
        // Only what opened may move the window.
        self.window.accept(header.counter).then_some(())?;
        Control::decode(&body[..len])
    }
}

fn nonce(counter: u64) -> [u8; 12] {
    let mut out = [0; 12];
    out[4..].copy_from_slice(&counter.to_be_bytes());
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (Channel, Channel) {
        (Channel::new(&Key([5; 32]), false, 0), Channel::new(&Key([5; 32]), true, 77))
    }

    #[test]
    fn a_frame_opens_once_and_only_at_the_other_end() {
        let (mut node, mut relay) = pair();
        assert_eq!(node.registration, relay.registration);
        let message = Control::Ping { nonce: 1 };
        let frame = node.seal(&message);
        assert_eq!(relay.open(&frame), Some(message.clone()));
        assert_eq!(relay.open(&frame), None, "replayed");
        let frame = relay.seal(&message);
        assert!(relay.open(&frame).is_none(), "reflected");
        assert_eq!(node.open(&frame), Some(message));
    }

    #[test]
    fn cut_or_changed_frames_do_not_open() {
        let (mut node, mut relay) = pair();
        let frame = node.seal(&Control::Open { request: 2, name: "edge-2".into() });
        for len in 0..frame.len() {
            assert_eq!(relay.open(&frame[..len]), None);
        }
        for at in 0..frame.len() {
            let mut changed = frame.clone();
            changed[at] ^= 1;
            assert!(relay.open(&changed).is_none(), "byte {at}");
        }
    }

    #[test]
    fn the_window_takes_each_counter_once() {
        let mut window = Window::default();
        let order = [3, 1, 2, 3, 70, 6, 7, 7, 70, 200, 136, 137];
        let taken: Vec<u64> = order.into_iter().filter(|c| window.accept(*c)).collect();
        assert_eq!(taken, [3, 1, 2, 70, 7, 200, 137]);
    }
}
