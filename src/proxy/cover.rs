//! Which prefixes are routed to weft0, so that a host without a default route still reaches the VIPs:
//! few, as narrow as that allows, and never in the way of an address that is really somewhere.

use crate::sorted::Set;
use std::{
    fmt,
    net::{IpAddr, Ipv4Addr},
    str::FromStr,
};

/// Routes that we aim at; above it neighbouring prefixes are merged.
pub const ROUTES: usize = 16;

/// Routes that we make at most, where merging would cover a foreign address. VIPs beyond it have no
/// route of ours: they need the default route, as they would without us.
pub const ROUTES_MOST: usize = 256;

/// The widest prefix that we make, of the last 32 bits of an address. kube-apiserver takes no wider
/// --service-cluster-ip-range: /12 for IPv4, /108 for IPv6.
const WIDEST: u8 = 12;

/// An IPv4 prefix; the bits beyond its length are zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Prefix {
    bits: u32,
    len: u8,
}

impl Prefix {
    /// The prefix of this length that holds the address; a length over 32 counts as 32.
    #[must_use]
    pub fn new(address: Ipv4Addr, len: u8) -> Self {
        let len = len.min(32);
        Self { bits: u32::from(address) & mask(len), len }
    }

    #[must_use]
    pub fn address(self) -> Ipv4Addr {
        self.bits.into()
    }

    #[must_use]
    pub fn length(self) -> u8 {
        self.len
    }

    #[must_use]
    pub fn contains(self, address: Ipv4Addr) -> bool {
        u32::from(address) & mask(self.len) == self.bits
    }

    /// The narrowest prefix that holds both.
    fn join(self, other: Self) -> Self {
        let same = (self.bits ^ other.bits).leading_zeros();
        let len = self.len.min(other.len).min(u8::try_from(same).unwrap_or(32));
        Self { bits: self.bits & mask(len), len }
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address(), self.len)
    }
}

fn mask(len: u8) -> u32 {
    u32::MAX.checked_shl(32 - u32::from(len)).unwrap_or(0)
}

/// A network of either family; the bits beyond its length are zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Net {
    address: IpAddr,
    length: u8,
}

impl Net {
    /// The network of this length that holds the address; one that is too long counts as the address alone.
    #[must_use]
    pub fn new(address: IpAddr, length: u8) -> Self {
        match address {
            IpAddr::V4(v4) => {
                let length = length.min(32);
                Self { address: (u32::from(v4) & mask(length)).to_be_bytes().into(), length }
            }
            IpAddr::V6(v6) => {
                let length = length.min(128);
                let mask = u128::MAX.checked_shl(128 - u32::from(length)).unwrap_or(0);
                Self { address: (u128::from(v6) & mask).to_be_bytes().into(), length }
            }
        }
    }

    #[must_use]
    pub fn host(address: IpAddr) -> Self {
        Self { address, length: longest(address) }
    }

    #[must_use]
    pub fn address(self) -> IpAddr {
        self.address
    }

    #[must_use]
    pub fn length(self) -> u8 {
        self.length
    }

    #[must_use]
    pub fn contains(self, address: IpAddr) -> bool {
        address.is_ipv4() == self.address.is_ipv4() && Self::new(address, self.length) == self
    }
}

impl From<Prefix> for Net {
    fn from(prefix: Prefix) -> Self {
        Self { address: prefix.address().into(), length: prefix.len }
    }
}

impl fmt::Display for Net {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.length)
    }
}

fn longest(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

/// `10.0.0.0/8`, or an address alone; no bit beyond the length may be set.
impl FromStr for Net {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (address, length) = text.split_once('/').unwrap_or((text, ""));
        let address: IpAddr = address.parse().map_err(drop)?;
        let most = longest(address);
        let length = if length.is_empty() && !text.contains('/') { most } else { length.parse().map_err(drop)? };
        let net = Self::new(address, length);
        if length <= most && net.address == address { Ok(net) } else { Err(()) }
    }
}

/// What we route, and how many VIPs are left to routes that are there already, or to none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cover {
    pub nets: Vec<Net>,
    /// VIPs beyond [`ROUTES_MOST`].
    pub left_out: usize,
}

/// Addresses to keep clear of, as disjoint ranges in order: 20,000 endpoints are asked 100,000 times.
struct Ranges(Vec<(u32, u32)>);

impl Ranges {
    fn new(prefixes: impl Iterator<Item = Prefix>) -> Self {
        let mut all: Vec<_> = prefixes.map(|p| (p.bits, p.bits | !mask(p.len))).collect();
        all.sort_unstable_by_key(|range| (range.0, std::cmp::Reverse(range.1)));
        // Prefixes nest or are disjoint, so what starts inside the last one also ends there.
        all.dedup_by(|next, last| next.0 <= last.1);
        Self(all)
    }

    fn overlap(&self, prefix: Prefix) -> bool {
        let after = self.0.partition_point(|range| range.1 < prefix.bits);
        self.0.get(after).is_some_and(|range| range.0 <= (prefix.bits | !mask(prefix.len)))
    }
}

/// All but the last 32 bits of an address, which for IPv4 are the same for all, and those.
fn split(address: IpAddr) -> (u128, u32) {
    let bits = match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().to_bits(),
        IpAddr::V6(v6) => v6.to_bits(),
    };
    (bits >> 32, bits as u32)
}

/// The part of a network that lies among the addresses with these first bits.
fn part(net: Net, high: u128) -> Option<Prefix> {
    let (its, low) = split(net.address);
    match (net.length + (128 - longest(net.address))).checked_sub(96) {
        Some(len) => (its == high).then_some(Prefix { bits: low, len }),
        None => (its ^ high).checked_shr(96 - u32::from(net.length)).is_none_or(|differ| differ == 0).then_some(ALL),
    }
}

const ALL: Prefix = Prefix { bits: 0, len: 0 };

/// Covers the VIPs. None of the networks overlaps one of `avoid`: connected networks, foreign routes, addresses of
/// nodes and endpoints. A VIP inside one of those has its route already.
#[must_use]
pub fn cover(vips: &Set<IpAddr>, avoid: &[Net]) -> Cover {
    let vips: Vec<IpAddr> = vips.iter().copied().collect();
    let mut nets = Vec::new();
    for group in vips.chunk_by(|a, b| split(*a).0 == split(*b).0) {
        let high = split(group[0]).0;
        let avoid = Ranges::new(avoid.iter().filter_map(|net| part(*net, high)));
        let back = |p: Prefix| match group[0] {
            IpAddr::V4(_) => p.into(),
            IpAddr::V6(_) => {
                Net { address: (high << 32 | u128::from(p.bits)).to_be_bytes().into(), length: 96 + p.len }
            }
        };
        nets.extend(covered(group.iter().map(|ip| split(*ip).1), &avoid).into_iter().map(back));
    }
    let left_out = nets.len().saturating_sub(ROUTES_MOST);
    nets.truncate(ROUTES_MOST);
    Cover { nets, left_out }
}

fn covered(vips: impl Iterator<Item = u32>, avoid: &Ranges) -> Vec<Prefix> {
    let mut prefixes: Vec<Prefix> = vips.map(|bits| Prefix { bits, len: 32 }).filter(|p| !avoid.overlap(*p)).collect();
    for len in (WIDEST..32).rev() {
        if prefixes.len() <= ROUTES {
            break;
        }
        prefixes = merged(&prefixes, len, avoid);
    }
    prefixes
}

/// Merges neighbours into prefixes that are no shorter than `len`. The list is in order and stays so.
fn merged(prefixes: &[Prefix], len: u8, avoid: &Ranges) -> Vec<Prefix> {
    let mut out: Vec<Prefix> = Vec::with_capacity(prefixes.len());
    for prefix in prefixes {
        if let Some(last) = out.last_mut() {
            let join = last.join(*prefix);
            if join.len >= len && !avoid.overlap(join) {
                *last = join;
                continue;
            }
        }
        out.push(*prefix);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(text: &str) -> Net {
        text.parse().unwrap()
    }

    fn vips<const N: usize>(all: [&str; N]) -> Set<IpAddr> {
        all.map(|ip| ip.parse().unwrap()).into()
    }

    #[test]
    fn networks() {
        for (net, inside, outside) in [
            ("10.0.0.0/8", "10.255.1.2", "11.0.0.0"),
            ("192.0.2.1", "192.0.2.1", "192.0.2.0"),
            ("0.0.0.0/0", "255.0.0.1", "::1"),
            ("::/0", "fe80::1", "0.0.0.0"),
            ("fc00::/7", "fdff::1", "fe00::1"),
            ("fd00::8/125", "fd00::f", "fd00::10"),
        ] {
            let net: Net = net.parse().unwrap();
            assert!(net.contains(inside.parse().unwrap()) && !net.contains(outside.parse().unwrap()), "{net:?}");
        }
        for bad in ["", "/", "10.0.0.0/", "10.0.0.0/33", "10.0.0.1/8", "::/129", "::1/64", "10.0.0.0/-1", "x/8"] {
            assert_eq!(bad.parse::<Net>(), Err(()), "{bad}");
        }
    }

    /// Addresses of a network of IPv4, and beside each that of IPv6 with the same last bits.
    fn random(rng: &mut fastrand::Rng, within: &str, count: usize) -> Set<IpAddr> {
        let within = net(within);
        let bits = split(within.address).1;
        let low = (0..count).map(|_| Ipv4Addr::from(bits | rng.u32(..) & !mask(within.length)));
        low.flat_map(|v4| [IpAddr::V4(v4), sixth(v4)]).collect()
    }

    fn sixth(v4: Ipv4Addr) -> IpAddr {
        (0xfd00_0000_0000_0000_0000_0096 << 32 | u128::from(v4.to_bits())).to_be_bytes().into()
    }

    #[test]
    fn few_vips_are_routed_one_by_one() {
        let few = vips(["10.96.0.1", "10.96.0.10", "fd00::1", "fd00:1::2"]);
        let want = ["10.96.0.1", "10.96.0.10", "fd00::1", "fd00:1::2"].map(net);
        assert_eq!(cover(&few, &[]).nets, want);
        assert_eq!(cover(&Set::new(), &[]), Cover::default());
    }

    #[test]
    fn many_vips_of_one_range_stay_inside_it() {
        let mut rng = fastrand::Rng::with_seed(1);
        let got = cover(&random(&mut rng, "10.96.0.0/12", 1_000), &[]);
        assert!(got.nets.len() <= 2 * ROUTES, "{got:?}");
        let within = |n: &Net| [net("10.96.0.0/12"), net("fd00:0:0:0:0:96:a60::/108")].iter().any(|w| holds(*w, *n));
        assert!(got.nets.iter().all(within), "{got:?}");
    }

    fn holds(wide: Net, narrow: Net) -> bool {
        wide.contains(narrow.address) && wide.length <= narrow.length
    }

    #[test]
    fn a_vip_that_has_a_route_of_its_own_gets_none() {
        let some = vips(["10.96.0.1", "192.168.1.5", "fd00::1", "fd00:1::1"]);
        let avoid = ["192.168.1.0/24", "fd00:1::/64"].map(net);
        assert_eq!(cover(&some, &avoid).nets, ["10.96.0.1", "fd00::1"].map(net));
        assert_eq!(cover(&some, &["0.0.0.0/0", "::/0"].map(net)), Cover::default());
    }

    #[test]
    fn every_vip_is_covered_once_and_nothing_that_is_to_be_avoided() {
        for seed in crate::seeds(300) {
            let mut rng = fastrand::Rng::with_seed(seed);
            let mut vips = random(&mut rng, "10.96.0.0/16", 60);
            vips.extend(random(&mut rng, "172.20.0.0/14", 60));
            let mut avoid: Vec<_> = random(&mut rng, "10.96.0.0/14", 20).into_iter().map(Net::host).collect();
            for ip in random(&mut rng, "172.20.0.0/14", 4) {
                let length = rng.u8(18..30);
                avoid.push(Net::new(ip, if ip.is_ipv4() { length } else { 96 + length }));
            }
            let got = cover(&vips, &avoid);
            for vip in vips {
                let routes = got.nets.iter().filter(|n| n.contains(vip)).count();
                let wanted = usize::from(!avoid.iter().any(|a| a.contains(vip)));
                assert_eq!(routes, wanted, "seed {seed}: {vip} in {got:?}");
            }
            for n in &got.nets {
                assert!(!avoid.iter().any(|a| holds(*a, *n) || holds(*n, *a)), "seed {seed}: {n}");
            }
            assert!(got.nets.len() < 128, "seed {seed}: {}", got.nets.len());
        }
    }

    #[test]
    fn vips_that_lie_far_apart_are_bounded() {
        let vips: Set<_> = (0..1_000_u32).map(|i| IpAddr::V4((i << 22).into())).collect();
        let beside = (0..1_000_u32).map(|i| Net::host(Ipv4Addr::from(i << 22 | 1).into())).collect::<Vec<_>>();
        let got = cover(&vips, &beside);
        assert_eq!((got.nets.len(), got.left_out), (ROUTES_MOST, 1_000 - ROUTES_MOST));
        let far: Set<_> = (0..300_u128).map(|i| IpAddr::V6((i << 64).into())).collect();
        assert_eq!(cover(&far, &[]).left_out, 300 - ROUTES_MOST);
    }
}
