//! Messages of nf_tables: what a batch and its nested attributes look like on the wire. Headers and lengths are
//! host-endian (netlink(7)), numbers in attributes of nf_tables are in network order.

// linux/netlink.h
const HEADER: usize = 16;
const NLM_F_REQUEST: u16 = 0x1;
pub const NLM_F_ACK: u16 = 0x4;
pub const NLM_F_DUMP: u16 = 0x300;
pub const NLM_F_CREATE: u16 = 0x400;
pub const NLM_F_APPEND: u16 = 0x800;
const NLA_F_NESTED: u16 = 0x8000;
const NLA_TYPE: u16 = 0x3fff;
// linux/netfilter/nfnetlink.h
const NFNL_MSG_BATCH_BEGIN: u16 = 16;
const NFNL_MSG_BATCH_END: u16 = 17;
const SUBSYSTEM: u8 = 10;
/// nfgenmsg: family, version, resource id.
pub const GENERIC: usize = 4;

/// The kinds of messages of nf_tables that we speak (`NFT_MSG_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    NewTable = 0,
    DelTable = 2,
    NewChain = 3,
    GetChain = 4,
    DelChain = 5,
    NewRule = 6,
    GetRule = 7,
    DelRule = 8,
    NewSet = 9,
    NewElement = 12,
    GetElement = 13,
    DelElement = 14,
    GetGeneration = 16,
}

impl Kind {
    /// The type in a message's header.
    #[must_use]
    pub const fn number(self) -> u16 {
        (SUBSYSTEM as u16) << 8 | self as u16
    }
}

/// What stands in the family of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Family {
    /// NFPROTO_INET: IPv4 and IPv6.
    Inet = 1,
    V4 = 2,
    V6 = 10,
}

impl Family {
    #[must_use]
    pub fn of(number: u8) -> Option<Self> {
        [Self::Inet, Self::V4, Self::V6].into_iter().find(|f| *f as u8 == number)
    }

    /// As nft writes it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Inet => "inet",
            Self::V4 => "ip",
            Self::V6 => "ip6",
        }
    }
}

fn aligned(len: usize) -> usize {
    len.next_multiple_of(4)
}

/// Attributes that are being written.
#[derive(Debug)]
pub struct Attrs<'b>(&'b mut Vec<u8>);

impl Attrs<'_> {
    fn open(&mut self, kind: u16) -> usize {
        let at = self.0.len();
        self.0.extend([0; 2]);
        self.0.extend(kind.to_ne_bytes());
        at
    }

    fn close(&mut self, at: usize) {
        // Those who write lists keep them below 64 KiB.
        let len = u16::try_from(self.0.len() - at).unwrap_or(u16::MAX);
        self.0[at..at + 2].copy_from_slice(&len.to_ne_bytes());
        self.0.resize(aligned(self.0.len()), 0);
    }

    pub fn bytes(&mut self, kind: u16, value: &[u8]) {
        let at = self.open(kind);
        self.0.extend(value);
        self.close(at);
    }

    /// Attributes that are written already.
    pub fn raw(&mut self, attrs: &[u8]) {
        self.0.extend(attrs);
    }

    pub fn number(&mut self, kind: u16, value: u32) {
        self.bytes(kind, &value.to_be_bytes());
    }

    pub fn long(&mut self, kind: u16, value: u64) {
        self.bytes(kind, &value.to_be_bytes());
    }

    /// With its final zero.
    pub fn text(&mut self, kind: u16, value: &str) {
        let at = self.open(kind);
        self.0.extend(value.bytes().chain([0]));
        self.close(at);
    }

    pub fn nest(&mut self, kind: u16, inside: impl FnOnce(&mut Self)) {
        let at = self.open(kind | NLA_F_NESTED);
        inside(self);
        self.close(at);
    }
}

fn header(out: &mut Vec<u8>, kind: u16, flags: u16, seq: u32, generic: [u8; GENERIC]) -> usize {
    let at = out.len();
    out.extend([0; 4]);
    out.extend(kind.to_ne_bytes());
    out.extend((flags | NLM_F_REQUEST).to_ne_bytes());
    out.extend(seq.to_ne_bytes());
    out.extend([0; 4]);
    out.extend(generic);
    at
}

fn end(out: &mut [u8], at: usize) {
    let len = u32::try_from(out.len() - at).unwrap_or(u32::MAX);
    out[at..at + 4].copy_from_slice(&len.to_ne_bytes());
}

/// One message of nfnetlink, of any subsystem.
#[must_use]
pub fn message(kind: u16, flags: u16, seq: u32, family: u8, attrs: impl FnOnce(&mut Attrs<'_>)) -> Vec<u8> {
    let mut out = Vec::new();
    let at = header(&mut out, kind, flags, seq, [family, 0, 0, 0]);
    attrs(&mut Attrs(&mut out));
    end(&mut out, at);
    out
}

/// One request outside of a batch.
#[must_use]
pub fn request(kind: Kind, flags: u16, seq: u32, family: u8, attrs: impl FnOnce(&mut Attrs<'_>)) -> Vec<u8> {
    message(kind.number(), flags, seq, family, attrs)
}

/// One transaction: all of its messages take effect at once, or none.
#[derive(Debug)]
pub struct Batch {
    bytes: Vec<u8>,
    /// Where its last message begins.
    last: Option<usize>,
}

impl Default for Batch {
    fn default() -> Self {
        let mut bytes = Vec::new();
        let at = header(&mut bytes, NFNL_MSG_BATCH_BEGIN, 0, 0, [0, 0, 0, SUBSYSTEM]);
        end(&mut bytes, at);
        Self { bytes, last: None }
    }
}

impl Batch {
    pub fn push(&mut self, kind: Kind, flags: u16, family: Family, attrs: impl FnOnce(&mut Attrs<'_>)) {
        let at = header(&mut self.bytes, kind.number(), flags, 0, [family as u8, 0, 0, 0]);
        attrs(&mut Attrs(&mut self.bytes));
        end(&mut self.bytes, at);
        self.last = Some(at);
    }

    /// Whether there is nothing to do.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.last.is_none()
    }

    /// The batch with its end, under a sequence number. Its last message asks for an answer: the first answer to
    /// come, error or not, is the answer to all.
    #[must_use]
    pub fn done(mut self, seq: u32) -> Vec<u8> {
        if let Some(at) = self.last {
            let flags = u16::from_ne_bytes([self.bytes[at + 6], self.bytes[at + 7]]) | NLM_F_ACK;
            self.bytes[at + 6..at + 8].copy_from_slice(&flags.to_ne_bytes());
        }
        let at = header(&mut self.bytes, NFNL_MSG_BATCH_END, 0, 0, [0, 0, 0, SUBSYSTEM]);
        end(&mut self.bytes, at);
        let mut at = 0;
        while at < self.bytes.len() {
            let message = &mut self.bytes[at..];
            message[8..12].copy_from_slice(&seq.to_ne_bytes());
            let len = u32::from_ne_bytes([message[0], message[1], message[2], message[3]]);
            at += (len as usize).max(HEADER);
        }
        self.bytes
    }
}

/// Type and value of each attribute. Ends at the first that does not fit.
pub fn attrs(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let [a, b, c, d] = *bytes.get(..HEADER / 4)? else { return None };
        let len = usize::from(u16::from_ne_bytes([a, b]));
        let value = bytes.get(4..len)?;
        bytes = bytes.get(aligned(len)..).unwrap_or_default();
        Some((u16::from_ne_bytes([c, d]) & NLA_TYPE, value))
    })
}

/// The first attribute of a type.
#[must_use]
pub fn attr(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attrs(bytes).find(|(k, _)| *k == kind).map(|(_, value)| value)
}

/// A number in network order.
#[must_use]
pub fn number(bytes: &[u8]) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(..4)?.try_into().ok()?))
}

#[must_use]
pub fn long(bytes: &[u8]) -> Option<u64> {
    Some(u64::from_be_bytes(bytes.get(..8)?.try_into().ok()?))
}

/// A text up to its final zero; what is no UTF-8 is no name that we could answer with.
#[must_use]
pub fn text(bytes: &[u8]) -> Option<&str> {
    std::str::from_utf8(bytes.split(|b| *b == 0).next()?).ok()
}
