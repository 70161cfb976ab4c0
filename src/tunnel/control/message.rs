//! What a node and its relay say to each other, and how it is written.

use crate::tunnel::{
    frame::{Cursor, put_address, put_text},
    identity::{CERTIFICATE_MAX, Certificate},
};
use std::net::SocketAddr;

/// Relays that an entry names: those at which its node registers for data.
pub(in crate::tunnel) const ENTRY_RELAYS: usize = 2;

/// What a relay is to a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::tunnel) enum Rank {
    /// Holds its entry, no more.
    Listed,
    /// At hand should the first fall silent.
    Standby,
    First,
}

/// A relay, and where a node reaches it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::tunnel) struct RelayAt {
    pub(in crate::tunnel) address: SocketAddr,
    pub(in crate::tunnel) certificate: Certificate,
}

/// Where a node is to be found. Nobody signs it: who leaves it has registered under the node's key, and what else a
/// relay might make up of it is no worse than its silence, since flows lead through relays with a certificate alone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(in crate::tunnel) struct Entry {
    /// The newest wins.
    pub(in crate::tunnel) serial: u64,
    /// At most [`ENTRY_RELAYS`].
    pub(in crate::tunnel) relays: Vec<RelayAt>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::tunnel) enum Control {
    /// Node: are you there?
    Ping {
        nonce: u32,
    },
    /// Relay: yes, and you come from this address; the serial of your entry here (0: none), and for how many nodes
    /// I am the first relay.
    Pong {
        nonce: u32,
        observed: SocketAddr,
        serial: u64,
        load: u16,
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
    /// Node: what you are to me, and where I am to be found.
    Enter {
        rank: Rank,
        entry: Box<Entry>,
    },
    /// Relay: that node, with this certificate, is found there.
    Elsewhere {
        request: u32,
        certificate: Box<Certificate>,
        entry: Box<Entry>,
    },
    /// Relay: I am about to be restarted; come back after a part of so many milliseconds.
    Restarting {
        spread: u32,
    },
    /// Node: which certificate has the relay of this name?
    Which {
        name: String,
    },
    /// Relay: it registered here with this one.
    Known {
        certificate: Box<Certificate>,
    },
}

fn put_certificate(out: &mut Vec<u8>, certificate: &Certificate) {
    let bytes = certificate.encode();
    out.extend_from_slice(&u16::try_from(bytes.len()).unwrap_or(0).to_be_bytes());
    out.extend_from_slice(&bytes);
}

fn certificate(c: &mut Cursor<'_>) -> Option<Certificate> {
    let len = usize::from(c.u16()?);
    Certificate::decode(c.take(len).filter(|_| len <= CERTIFICATE_MAX)?).ok()
}

impl Entry {
    fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.serial.to_be_bytes());
        out.push(self.relays.len().min(ENTRY_RELAYS) as u8);
        for relay in self.relays.iter().take(ENTRY_RELAYS) {
            put_address(out, relay.address);
            put_certificate(out, &relay.certificate);
        }
    }

    fn decode(c: &mut Cursor<'_>) -> Option<Box<Self>> {
        let (serial, count) = (c.u64()?, usize::from(c.u8()?));
        let relay = |c: &mut Cursor<'_>| Some(RelayAt { address: c.address()?, certificate: certificate(c)? });
        let relays = (0..count).map(|_| relay(c)).take(ENTRY_RELAYS).collect::<Option<_>>()?;
        (count <= ENTRY_RELAYS).then(|| Box::new(Self { serial, relays }))
    }
}

impl Control {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(64);
        let number = |out: &mut Vec<u8>, kind: u8, number: u32| {
            out.push(kind);
            out.extend_from_slice(&number.to_be_bytes());
        };
        match self {
            Self::Ping { nonce } => number(&mut out, 1, *nonce),
            Self::Pong { nonce, observed, serial, load } => {
                number(&mut out, 2, *nonce);
                put_address(&mut out, *observed);
                out.extend_from_slice(&serial.to_be_bytes());
                out.extend_from_slice(&load.to_be_bytes());
            }
            Self::Open { request, name } => {
                number(&mut out, 3, *request);
                put_text(&mut out, name);
            }
            Self::Opened { request, flow, certificate } => {
                number(&mut out, 4, *request);
                out.extend_from_slice(&flow.to_be_bytes());
                put_certificate(&mut out, certificate);
            }
            Self::NotFound { request } => number(&mut out, 5, *request),
            Self::Flow { flow, certificate } => {
                number(&mut out, 6, *flow);
                put_certificate(&mut out, certificate);
            }
            Self::Who { flow } => number(&mut out, 7, *flow),
            Self::Challenge { token } => {
                out.push(8);
                out.extend_from_slice(&token.to_be_bytes());
            }
            Self::Answer { token } => {
                out.push(9);
                out.extend_from_slice(&token.to_be_bytes());
            }
            Self::Gone { flow } => number(&mut out, 10, *flow),
            Self::Bye => out.push(11),
            Self::Enter { rank, entry } => {
                let rank = match rank {
                    Rank::Listed => 0,
                    Rank::Standby => 1,
                    Rank::First => 2,
                };
                out.extend_from_slice(&[12, rank]);
                entry.encode(&mut out);
            }
            Self::Elsewhere { request, certificate, entry } => {
                number(&mut out, 13, *request);
                put_certificate(&mut out, certificate);
                entry.encode(&mut out);
            }
            Self::Restarting { spread } => number(&mut out, 14, *spread),
            Self::Which { name } => {
                out.push(15);
                put_text(&mut out, name);
            }
            Self::Known { certificate } => {
                out.push(16);
                put_certificate(&mut out, certificate);
            }
        }
        out
    }

    /// None for anything but one whole known message.
    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let mut c = Cursor(bytes);
        let boxed = |c: &mut Cursor<'_>| certificate(c).map(Box::new);
        let message = match c.u8()? {
            1 => Self::Ping { nonce: c.u32()? },
            2 => Self::Pong { nonce: c.u32()?, observed: c.address()?, serial: c.u64()?, load: c.u16()? },
            3 => Self::Open { request: c.u32()?, name: c.text()?.to_owned() },
            4 => Self::Opened { request: c.u32()?, flow: c.u32()?, certificate: boxed(&mut c)? },
            5 => Self::NotFound { request: c.u32()? },
            6 => Self::Flow { flow: c.u32()?, certificate: boxed(&mut c)? },
            7 => Self::Who { flow: c.u32()? },
            8 => Self::Challenge { token: c.u64()? },
            9 => Self::Answer { token: c.u64()? },
            10 => Self::Gone { flow: c.u32()? },
            11 => Self::Bye,
            12 => {
                let rank = match c.u8()? {
                    0 => Rank::Listed,
                    1 => Rank::Standby,
                    2 => Rank::First,
                    _ => return None,
                };
                Self::Enter { rank, entry: Entry::decode(&mut c)? }
            }
            13 => Self::Elsewhere { request: c.u32()?, certificate: boxed(&mut c)?, entry: Entry::decode(&mut c)? },
            14 => Self::Restarting { spread: c.u32()? },
            15 => Self::Which { name: c.text()?.to_owned() },
            16 => Self::Known { certificate: boxed(&mut c)? },
            _ => return None,
        };
        c.0.is_empty().then_some(message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tunnel::identity::{Authority, Request, Roles, Secret};

    #[test]
    fn every_message_survives_the_trip_and_no_cut() {
        let authority = Authority::from_seed(Secret::new([1; 32])).unwrap();
        let sign = |name: &str| {
            let request =
                Request { name: name.into(), key: [7; 32], roles: Roles::RELAY, network: String::new(), not_after: 9 };
            Box::new(authority.issue(request).unwrap())
        };
        let at = |a: &str, name: &str| RelayAt { address: a.parse().unwrap(), certificate: *sign(name) };
        let relays = vec![at("1.2.3.4:5", "relay-1"), at("[2001:db8::1]:5", "relay-2")];
        let entry = Box::new(Entry { serial: u64::MAX, relays });
        let messages = [
            Control::Ping { nonce: 1 },
            Control::Pong { nonce: 1, observed: "1.2.3.4:5".parse().unwrap(), serial: 3, load: 4 },
            Control::Pong { nonce: 1, observed: "[2001:db8::1]:5".parse().unwrap(), serial: 0, load: 0 },
            Control::Open { request: 2, name: "edge-2".into() },
            Control::Opened { request: 2, flow: 3, certificate: sign("edge-2") },
            Control::NotFound { request: 2 },
            Control::Flow { flow: 3, certificate: sign("edge-1") },
            Control::Who { flow: 9 },
            Control::Challenge { token: 3 },
            Control::Answer { token: 3 },
            Control::Gone { flow: 9 },
            Control::Bye,
            Control::Enter { rank: Rank::Listed, entry: entry.clone() },
            Control::Enter { rank: Rank::First, entry: Box::default() },
            Control::Elsewhere { request: 2, certificate: sign("edge-2"), entry },
            Control::Restarting { spread: 1000 },
            Control::Which { name: "relay-1".into() },
            Control::Known { certificate: sign("relay-1") },
        ];
        for message in messages {
            let bytes = message.encode();
            assert!((0..bytes.len()).all(|len| Control::decode(&bytes[..len]).is_none()), "{message:?}");
            assert!(Control::decode(&[&bytes[..], &[0]].concat()).is_none(), "{message:?}");
            assert_eq!(Control::decode(&bytes), Some(message));
        }
    }

    #[test]
    fn an_entry_of_too_many_relays_is_none() {
        assert!(Control::decode(&[&[12, 0], &[0; 8][..], &[ENTRY_RELAYS as u8 + 1], &[4; 600]].concat()).is_none());
        assert!(Control::decode(&[&[12, 3], &[0; 9][..]].concat()).is_none(), "an unknown rank");
    }
}
