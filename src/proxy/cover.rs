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

/// The widest prefix that we make. kube-apiserver takes no wider --service-cluster-ip-range for IPv4.
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
    pub fn host(address: Ipv4Addr) -> Self {
        Self::new(address, 32)
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

    /// Whether they have an address in common: then one holds the other.
    #[must_use]
    pub fn overlaps(self, other: Self) -> bool {
        let shorter = mask(self.len.min(other.len));
        self.bits & shorter == other.bits & shorter
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
    pub fn contains(self, address: IpAddr) -> bool {
        address.is_ipv4() == self.address.is_ipv4() && Self::new(address, self.length) == self
    }
}

/// `10.0.0.0/8`, or an address alone; no bit beyond the length may be set.
impl FromStr for Net {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (address, length) = text.split_once('/').unwrap_or((text, ""));
        let address: IpAddr = address.parse().map_err(drop)?;
        let most = if address.is_ipv4() { 32 } else { 128 };
        let length = if length.is_empty() && !text.contains('/') { most } else { length.parse().map_err(drop)? };
        let net = Self::new(address, length);
        if length <= most && net.address == address { Ok(net) } else { Err(()) }
    }
}

/// What we route, and how many VIPs are left to routes that are there already, or to none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cover {
    pub prefixes: Vec<Prefix>,
    /// VIPs beyond [`ROUTES_MOST`].
    pub left_out: usize,
}

/// Addresses to keep clear of, as disjoint ranges in order: 20,000 endpoints are asked 100,000 times.
struct Ranges(Vec<(u32, u32)>);

impl Ranges {
    fn new(prefixes: &[Prefix]) -> Self {
        let mut all: Vec<_> = prefixes.iter().map(|p| (p.bits, p.bits | !mask(p.len))).collect();
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

/// Covers the VIPs. None of the prefixes overlaps one of `avoid`: connected networks, foreign routes,
/// addresses of nodes and endpoints. A VIP inside one of those has its route already.
#[must_use]
pub fn cover(vips: &Set<Ipv4Addr>, avoid: &[Prefix]) -> Cover {
    let avoid = Ranges::new(avoid);
    let mut prefixes: Vec<Prefix> = vips.iter().map(|ip| Prefix::host(*ip)).filter(|p| !avoid.overlap(*p)).collect();
    for len in (WIDEST..32).rev() {
        if prefixes.len() <= ROUTES {
            break;
        }
        prefixes = merged(&prefixes, len, &avoid);
    }
    let left_out = prefixes.len().saturating_sub(ROUTES_MOST);
    prefixes.truncate(ROUTES_MOST);
    Cover { prefixes, left_out }
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

    fn prefix(text: &str) -> Prefix {
        let (address, len) = text.split_once('/').unwrap();
        Prefix::new(address.parse().unwrap(), len.parse().unwrap())
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

    fn random(rng: &mut fastrand::Rng, net: &str, count: usize) -> Set<Ipv4Addr> {
        let net = prefix(net);
        (0..count).map(|_| Ipv4Addr::from(net.bits | rng.u32(..) & !mask(net.len))).collect()
    }

    #[test]
    fn few_vips_are_routed_one_by_one() {
        let vips = ["10.96.0.1", "10.96.0.10"].map(|ip| ip.parse().unwrap());
        assert_eq!(cover(&vips.into(), &[]).prefixes, [prefix("10.96.0.1/32"), prefix("10.96.0.10/32")]);
        assert_eq!(cover(&Set::new(), &[]), Cover::default());
    }

    #[test]
    fn many_vips_of_one_range_stay_inside_it() {
        let mut rng = fastrand::Rng::with_seed(1);
        let vips = random(&mut rng, "10.96.0.0/12", 1_000);
        let got = cover(&vips, &[]);
        assert!(got.prefixes.len() <= ROUTES, "{got:?}");
        assert!(got.prefixes.iter().all(|p| prefix("10.96.0.0/12").overlaps(*p) && p.len >= 12), "{got:?}");
    }

    #[test]
    fn a_vip_that_has_a_route_of_its_own_gets_none() {
        let vips = ["10.96.0.1", "192.168.1.5"].map(|ip| ip.parse().unwrap());
        assert_eq!(cover(&vips.into(), &[prefix("192.168.1.0/24")]).prefixes, [prefix("10.96.0.1/32")]);
        assert_eq!(cover(&vips.into(), &[prefix("0.0.0.0/0")]), Cover::default());
    }

    #[test]
    fn every_vip_is_covered_once_and_nothing_that_is_to_be_avoided() {
        for seed in crate::seeds(300) {
            let mut rng = fastrand::Rng::with_seed(seed);
            let mut vips = random(&mut rng, "10.96.0.0/16", 60);
            vips.extend(random(&mut rng, "172.20.0.0/14", 60));
            let mut avoid: Vec<_> = random(&mut rng, "10.96.0.0/14", 20).into_iter().map(Prefix::host).collect();
            avoid.extend(random(&mut rng, "172.20.0.0/14", 4).into_iter().map(|ip| Prefix::new(ip, rng.u8(18..30))));
            let got = cover(&vips, &avoid);
            for vip in vips {
                let routes = got.prefixes.iter().filter(|p| p.contains(vip)).count();
                let wanted = usize::from(!avoid.iter().any(|a| a.contains(vip)));
                assert_eq!(routes, wanted, "seed {seed}: {vip} in {got:?}");
            }
            for p in &got.prefixes {
                assert!(!avoid.iter().any(|a| a.overlaps(*p)), "seed {seed}: {p}");
            }
            assert!(got.prefixes.len() < 64, "seed {seed}: {}", got.prefixes.len());
        }
    }

    #[test]
    fn vips_that_lie_far_apart_are_bounded() {
        let vips: Set<_> = (0..1_000_u32).map(|i| Ipv4Addr::from(i << 22)).collect();
        let got = cover(&vips, &(0..1_000_u32).map(|i| Prefix::host((i << 22 | 1).into())).collect::<Vec<_>>());
        assert_eq!((got.prefixes.len(), got.left_out), (ROUTES_MOST, 1_000 - ROUTES_MOST));
    }
}
