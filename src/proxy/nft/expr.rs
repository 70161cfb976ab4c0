//! The expressions that our rules are made of. The numbers are those of linux/netfilter/nf_tables.h.

use super::wire::{Attrs, Family};

/// Four bytes of the registers each; an address of IPv6 takes four.
pub const REGISTERS: u32 = 8;
const VERDICT_REGISTER: u32 = 0;

/// linux/rtnetlink.h, in the host's order.
const RTN_LOCAL: [u8; 4] = 2_u32.to_ne_bytes();

const ELEMENT: u16 = 1;
const NAME: u16 = 1;
const DATA: u16 = 2;
const VALUE: u16 = 1;
const VERDICT: u16 = 2;

/// What a rule looks at beside the packet's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Meta {
    Mark = 3,
    InName = 6,
    OutName = 7,
    Family = 15,
    Protocol = 16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict<'t> {
    Accept,
    Drop,
    Return,
    Jump(&'t str),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    Reset,
    Unreachable,
}

/// One expression. Registers are counted in steps of four bytes from the first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expr<'t> {
    Meta(Meta, u32),
    /// The destination address.
    Destination(Family, u32),
    /// The first byte of an IPv6 destination, into the first register.
    Prefix,
    /// The destination port; the protocol must be one that has ports.
    Port(u32),
    /// `ct status` into the first register.
    Status,
    /// Goes on where the first register holds these bytes.
    Is(&'t [u8]),
    IsNot(&'t [u8]),
    /// Keeps these bits of the first register.
    And([u8; 4]),
    /// Goes on where the registers from the first on hold a key of the set.
    In(&'t str),
    /// As above, and puts the key's value into the registers from the first on.
    Map(&'t str),
    /// Goes on where the destination is an address of this host.
    Local,
    /// To the address and port in the registers.
    Dnat(Family),
    Verdict(Verdict<'t>),
    Refuse(Refusal, Family),
}

/// How many registers an address takes.
#[must_use]
pub fn registers(family: Family) -> u32 {
    match family {
        Family::V4 | Family::Inet => 1,
        Family::V6 => 4,
    }
}

/// The kernel's name for the registers from this one on: four together are numbered from 1, single ones from 8.
fn register(at: u32) -> u32 {
    if at.is_multiple_of(4) { 1 + at / 4 } else { REGISTERS + at }
}

/// One attribute.
enum Attr<'a> {
    Number(u16, u32),
    Byte(u16, u8),
    Text(u16, &'a str),
    /// Bytes inside a data attribute.
    Value(u16, &'a [u8]),
    Verdict(u16, i32, Option<&'a str>),
}

fn write(out: &mut Attrs<'_>, name: &str, attrs: &[Attr<'_>]) {
    out.nest(ELEMENT, |e| {
        e.text(NAME, name);
        e.nest(DATA, |d| {
            for attr in attrs {
                match *attr {
                    Attr::Number(kind, value) => d.number(kind, value),
                    Attr::Byte(kind, value) => d.bytes(kind, &[value]),
                    Attr::Text(kind, value) => d.text(kind, value),
                    Attr::Value(kind, value) => d.nest(kind, |v| v.bytes(VALUE, value)),
                    Attr::Verdict(kind, code, chain) => d.nest(kind, |v| {
                        v.nest(VERDICT, |v| {
                            v.number(1, code.cast_unsigned());
                            if let Some(chain) = chain {
                                v.text(2, chain);
                            }
                        });
                    }),
                }
            }
        });
    });
}

impl Expr<'_> {
    /// Writes it as an element of a rule's list.
    pub fn write(&self, out: &mut Attrs<'_>) {
        use Attr::{Byte, Number, Text, Value};
        let first = register(0);
        match *self {
            Self::Meta(key, to) => write(out, "meta", &[Number(2, key as u32), Number(1, register(to))]),
            Self::Destination(family, to) => {
                let (offset, len) = match family {
                    Family::V4 | Family::Inet => (16, 4),
                    Family::V6 => (24, 16),
                };
                let attrs = [Number(1, register(to)), Number(2, 1), Number(3, offset), Number(4, len)];
                write(out, "payload", &attrs);
            }
            Self::Prefix => write(out, "payload", &[Number(1, first), Number(2, 1), Number(3, 24), Number(4, 1)]),
            Self::Port(to) => {
                write(out, "payload", &[Number(1, register(to)), Number(2, 2), Number(3, 2), Number(4, 2)]);
            }
            Self::Status => write(out, "ct", &[Number(2, 2), Number(1, first)]),
            Self::Is(bytes) => write(out, "cmp", &[Number(1, first), Number(2, 0), Value(3, bytes)]),
            Self::IsNot(bytes) => write(out, "cmp", &[Number(1, first), Number(2, 1), Value(3, bytes)]),
            Self::And(mask) => {
                let attrs = [
                    Number(1, first),
                    Number(2, first),
                    Number(3, 4),
                    Number(6, 0),
                    Value(4, &mask),
                    Value(5, &[0; 4]),
                ];
                write(out, "bitwise", &attrs);
            }
            Self::In(set) => write(out, "lookup", &[Text(1, set), Number(2, first)]),
            Self::Map(set) => write(out, "lookup", &[Text(1, set), Number(2, first), Number(3, first)]),
            Self::Local => {
                // NFT_FIB_RESULT_ADDRTYPE of NFTA_FIB_F_DADDR.
                write(out, "fib", &[Number(3, 2), Number(2, 3), Number(1, first)]);
                Self::Is(&RTN_LOCAL).write(out);
            }
            Self::Dnat(family) => {
                let port = register(registers(family));
                write(
                    out,
                    "nat",
                    &[Number(1, 1), Number(2, u32::from(family as u8)), Number(3, first), Number(5, port)],
                );
            }
            Self::Verdict(verdict) => {
                let (code, chain) = match verdict {
                    Verdict::Accept => (1, None),
                    Verdict::Drop => (0, None),
                    Verdict::Return => (-5, None),
                    Verdict::Jump(chain) => (-3, Some(chain)),
                };
                write(out, "immediate", &[Number(1, VERDICT_REGISTER), Attr::Verdict(2, code, chain)]);
            }
            Self::Refuse(refusal, family) => {
                let (kind, code) = match (refusal, family) {
                    (Refusal::Reset, _) => (1, 0),
                    // ICMP and ICMPv6: port unreachable.
                    (Refusal::Unreachable, Family::V6) => (0, 4),
                    (Refusal::Unreachable, Family::V4 | Family::Inet) => (0, 3),
                };
                write(out, "reject", &[Number(1, kind), Byte(2, code)]);
            }
        }
    }
}
