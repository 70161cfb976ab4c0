//! Relay control (0x12): sealed messages between a node and a relay where it is registered.
//!
//! `0x12 | registration u64 | cookie u64 | counter u64 | ChaCha20-Poly1305(message)`. The registration's
//! secret is the exporter of the one handshake that made it. The cookie is the relay's mark on the
//! registration: after a restart it knows by it that a registration was its own and may say that it is
//! gone (a frame without a message), while strangers get nothing.

use super::{
    frame::{Cursor, RELAY_CONTROL, TagKey, put_address, put_text},
    identity::Certificate,
    keys::{Aead, Key, TAG_LEN, derive},
};
use std::net::SocketAddr;

/// First byte, registration, cookie, counter.
pub(super) const CONTROL_HEADER: usize = 25;
/// The largest message is a certificate (at most 512 bytes) and a few numbers.
const MESSAGE_MAX: usize = 1024;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Control {
    /// Node: are you there?
    Ping {
        nonce: u32,
    },
    /// Relay: yes, and you come from this address.
    Pong {
        nonce: u32,
        observed: SocketAddr,
    },
    /// Node: a flow to the node of this name, please.
    Open {
        request: u32,
        name: String,
    },
    /// Relay: here it is, and the certificate with which that node registered.
    Opened {
        request: u32,
        flow: u32,
        certificate: Box<Certificate>,
    },
    /// Relay: no node of that name is registered here.
    NotFound {
        request: u32,
    },
    /// Relay, to the other end: this flow is with the holder of this certificate.
    Flow {
        flow: u32,
        certificate: Box<Certificate>,
    },
    /// Node: with whom is this flow?
    Who {
        flow: u32,
    },
    /// Relay: you come from a new address; prove that you receive there.
    Challenge {
        token: u64,
    },
    Answer {
        token: u64,
    },
    /// Relay: this flow does not exist (any more).
    Gone {
        flow: u32,
    },
    /// Node: I am leaving.
    Bye,
}

impl Control {
    fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(64);
        match self {
            Self::Ping { nonce } => {
                out.push(1);
                out.extend_from_slice(&nonce.to_be_bytes());
            }
            Self::Pong { nonce, observed } => {
                out.push(2);
                out.extend_from_slice(&nonce.to_be_bytes());
                put_address(&mut out, *observed);
            }
            Self::Open { request, name } => {
                out.push(3);
                out.extend_from_slice(&request.to_be_bytes());
                put_text(&mut out, name);
            }
            Self::Opened { request, flow, certificate } => {
                out.push(4);
                out.extend_from_slice(&request.to_be_bytes());
                out.extend_from_slice(&flow.to_be_bytes());
                out.extend_from_slice(&certificate.encode());
            }
            Self::NotFound { request } => {
                out.push(5);
                out.extend_from_slice(&request.to_be_bytes());
            }
            Self::Flow { flow, certificate } => {
                out.push(6);
                out.extend_from_slice(&flow.to_be_bytes());
                out.extend_from_slice(&certificate.encode());
            }
            Self::Who { flow } => {
                out.push(7);
                out.extend_from_slice(&flow.to_be_bytes());
            }
            Self::Challenge { token } => {
                out.push(8);
                out.extend_from_slice(&token.to_be_bytes());
            }
            Self::Answer { token } => {
                out.push(9);
                out.extend_from_slice(&token.to_be_bytes());
            }
            Self::Gone { flow } => {
                out.push(10);
                out.extend_from_slice(&flow.to_be_bytes());
            }
            Self::Bye => out.push(11),
        }
        out
    }

    /// None for anything but one whole known message.
    fn decode(bytes: &[u8]) -> Option<Self> {
        let mut c = Cursor(bytes);
        let certificate = |c: &mut Cursor<'_>| {
            let rest = c.take(c.0.len())?;
            Certificate::decode(rest).ok().map(Box::new)
        };
        let message = match c.u8()? {
            1 => Self::Ping { nonce: c.u32()? },
            2 => Self::Pong { nonce: c.u32()?, observed: c.address()? },
            3 => Self::Open { request: c.u32()?, name: c.text()?.to_owned() },
            4 => Self::Opened { request: c.u32()?, flow: c.u32()?, certificate: certificate(&mut c)? },
            5 => Self::NotFound { request: c.u32()? },
            6 => Self::Flow { flow: c.u32()?, certificate: certificate(&mut c)? },
            7 => Self::Who { flow: c.u32()? },
            8 => Self::Challenge { token: c.u64()? },
            9 => Self::Answer { token: c.u64()? },
            10 => Self::Gone { flow: c.u32()? },
            11 => Self::Bye,
            _ => return None,
        };
        c.0.is_empty().then_some(message)
    }
}

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
    fn every_message_without_a_certificate_survives_the_trip() {
        let (mut node, mut relay) = pair();
        assert_eq!(node.registration, relay.registration);
        for message in [
            Control::Ping { nonce: 1 },
            Control::Pong { nonce: 1, observed: "1.2.3.4:5".parse().unwrap() },
            Control::Pong { nonce: 1, observed: "[2001:db8::1]:5".parse().unwrap() },
            Control::Open { request: 2, name: "edge-2".into() },
            Control::NotFound { request: 2 },
            Control::Who { flow: 9 },
            Control::Challenge { token: 3 },
            Control::Answer { token: 3 },
            Control::Gone { flow: 9 },
            Control::Bye,
        ] {
            let frame = node.seal(&message);
            assert_eq!(relay.open(&frame), Some(message.clone()));
            assert_eq!(relay.open(&frame), None, "replayed");
            let frame = relay.seal(&message);
            assert!(relay.open(&frame).is_none(), "reflected");
            assert_eq!(node.open(&frame), Some(message));
        }
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
