//! What is to stand in which file: dnsmasq's configuration, plain or OpenWrt's, and systemd-resolved's.

use super::lines::{self, Added};
use crate::proxy::{cover::Prefix, rules::DEVICE};
use nanoserde::{DeJson, SerJson};
use std::{collections::BTreeMap, net::SocketAddr};

pub const UCI: &str = "/etc/config/dhcp";
pub const DNSMASQ: &str = "/etc/dnsmasq.conf";
pub const DNSMASQ_DROP_IN: &str = "/etc/dnsmasq.d/weft.conf";
pub const RESOLVED_DROP_IN: &str = "/etc/systemd/resolved.conf.d/weft.conf";
/// By its first line a file is known as ours.
const HEAD: &str = "# Written by `weft setup`; `weft setup --undo` removes it.\n";
/// Where Debian says which directory dnsmasq reads.
const DEBIAN: &str = "/etc/default/dnsmasq";

/// Files by their paths; None: it is not there.
pub type Files = BTreeMap<String, Option<String>>;

/// What was done, so that it can be undone.
#[derive(Clone, Debug, Default, DeJson, PartialEq, Eq, SerJson)]
pub struct Record {
    pub files: Vec<Changed>,
    /// Those that we have made, the outer ones first.
    pub directories: Vec<String>,
}

#[derive(Clone, Debug, DeJson, PartialEq, Eq, SerJson)]
pub struct Changed {
    pub path: String,
    /// Empty: the whole file is ours.
    pub added: Vec<Added>,
}

/// Who answers which names.
#[derive(Clone, Debug)]
pub struct Wants {
    pub domain: String,
    /// weft's DNS.
    pub server: SocketAddr,
    /// Networks whose addresses have names of the cluster.
    pub reverse: Vec<Prefix>,
}

/// Who is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resolver {
    Uci,
    Dnsmasq,
    Resolved,
}

impl Resolver {
    /// The program's.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Uci | Self::Dnsmasq => "dnsmasq",
            Self::Resolved => "systemd-resolved",
        }
    }
}

/// The files that must be known before [`apply`] and [`revert`].
pub const LOOKED_AT: [&str; 5] = [UCI, DNSMASQ, DNSMASQ_DROP_IN, RESOLVED_DROP_IN, DEBIAN];

impl Wants {
    /// As dnsmasq writes it.
    fn server(&self, plain: bool) -> String {
        let (ip, port) = (self.server.ip().to_string(), self.server.port().to_string());
        match self.server.port() {
            53 => ip,
            _ => [ip.as_str(), if plain { "#" } else { ":" }, &port].concat(),
        }
    }

    fn dnsmasq(&self) -> [(&'static str, &'static str, Vec<String>); 4] {
        let (domain, server) = (&self.domain, self.server(true));
        let reverse = self.reverse.iter().map(|net| [&net.to_string(), ",", &server].concat()).collect();
        [
            ("server", "server", vec![["/", domain, "/", &server].concat()]),
            ("rev-server", "rev_server", reverse),
            ("rebind-domain-ok", "rebind_domain", vec![domain.clone()]),
            ("except-interface", "notinterface", vec![DEVICE.into()]),
        ]
    }

    fn uci(&self) -> Vec<(&'static str, String)> {
        self.dnsmasq().into_iter().flat_map(|(_, list, values)| values.into_iter().map(move |v| (list, v))).collect()
    }

    fn plain(&self) -> String {
        let mut out = HEAD.to_owned();
        for (option, _, values) in self.dnsmasq() {
            for value in values {
                let slash = if option == "rebind-domain-ok" { "/" } else { "" };
                out += &[option, "=", slash, &value, slash, "\n"].concat();
            }
        }
        out
    }

    fn resolved(&self) -> String {
        let zones: String = self.reverse.iter().flat_map(zones).map(|zone| [" ~", &zone].concat()).collect();
        [HEAD, "[Resolve]\nDNS=", &self.server(false), "\nDomains=~", &self.domain, &zones, "\n"].concat()
    }
}

/// A network such as 10.0.0.0/8; with fewer than 4 bits it would be the internet's.
///
/// # Errors
/// What was expected.
pub fn network(text: &str) -> Result<Prefix, String> {
    let parse = || {
        let (address, length) = text.split_once('/')?;
        let net = Prefix::new(address.parse().ok()?, length.parse().ok().filter(|l| (4..=32).contains(l))?);
        (net.to_string() == text).then_some(net)
    };
    parse().ok_or_else(|| "expected a network such as 10.0.0.0/8, with no bits behind its length".into())
}

/// The zones of a network's names: there is one for each 8 bits.
fn zones(net: &Prefix) -> impl Iterator<Item = String> + use<> {
    let octets = usize::from(net.length()).div_ceil(8).max(1);
    let step = 1_u32 << (32 - 8 * octets);
    let count = 1_u32 << (8 * octets - usize::from(net.length()).max(8 * (octets - 1)));
    let first = u32::from(net.address());
    (0..count).map(move |n| {
        let bytes = first.wrapping_add(n * step).to_be_bytes();
        let labels: String = bytes[..octets].iter().rev().map(|b| b.to_string() + ".").collect();
        labels + "in-addr.arpa"
    })
}

/// Whether dnsmasq reads the files of its directory.
fn reads_directory(files: &Files) -> bool {
    let names = |path: &str, key: &str| {
        let text = files.get(path).cloned().flatten().unwrap_or_default();
        text.lines().any(|l| {
            let value = l.trim().strip_prefix(key).map(|v| v.trim_start_matches(['"', '\'']));
            value.is_some_and(|v| v.starts_with("/etc/dnsmasq.d"))
        })
    };
    names(DNSMASQ, "conf-dir=") || names(DEBIAN, "CONFIG_DIR=")
}

/// Puts everything in place.
///
/// # Errors
/// Where something else stands in the way; the text says what.
pub fn apply(files: &mut Files, resolvers: &[Resolver], wants: &Wants) -> Result<Record, String> {
    let mut record = Record::default();
    for resolver in resolvers {
        let (path, text) = match resolver {
            Resolver::Uci => {
                let text = files.get(UCI).cloned().flatten().unwrap_or_default();
                let (text, added) = lines::add_to_uci(&text, &wants.uci())
                    .ok_or_else(|| [UCI, " has no section `config dnsmasq`"].concat())?;
                files.insert(UCI.into(), Some(text));
                if !added.is_empty() {
                    record.files.push(Changed { path: UCI.into(), added });
                }
                continue;
            }
            Resolver::Dnsmasq => (DNSMASQ_DROP_IN, wants.plain()),
            Resolver::Resolved => (RESOLVED_DROP_IN, wants.resolved()),
        };
        if files.get(path).cloned().flatten().is_some_and(|old| !old.starts_with(HEAD)) {
            return Err([path, " is there already, and is not of weft: move it away"].concat());
        }
        files.insert(path.into(), Some(text));
        record.files.push(Changed { path: path.into(), added: Vec::new() });
        if *resolver == Resolver::Dnsmasq && !reads_directory(files) {
            let text = files.get(DNSMASQ).cloned().flatten().unwrap_or_default();
            let (text, added) = lines::append(&text, &["conf-file=", DNSMASQ_DROP_IN].concat());
            let ours = files.insert(DNSMASQ.into(), Some(text)).flatten().is_none();
            if ours || !added.is_empty() {
                let added = if ours { Vec::new() } else { added };
                record.files.push(Changed { path: DNSMASQ.into(), added });
            }
        }
    }
    Ok(record)
}

/// Takes everything out again. Without a record of it: what we would have put in.
pub fn revert(files: &mut Files, record: Option<&Record>, wants: &Wants) {
    let Some(record) = record else {
        for path in [DNSMASQ_DROP_IN, RESOLVED_DROP_IN] {
            if files.get(path).cloned().flatten().is_some_and(|text| text.starts_with(HEAD)) {
                files.insert(path.into(), None);
            }
        }
        let mut ours: Vec<String> =
            wants.uci().into_iter().map(|(list, value)| ["list ", list, " '", &value, "'"].concat()).collect();
        ours.push(["conf-file=", DNSMASQ_DROP_IN].concat());
        let text_of = |path: &str, files: &Files| files.get(path).cloned().flatten();
        for path in [UCI, DNSMASQ] {
            if let Some(text) = text_of(path, files) {
                let sections = 0..=text.lines().count().min(64);
                let added: Vec<_> = sections
                    .flat_map(|section| ours.iter().map(move |line| Added { section, line: line.clone() }))
                    .collect();
                files.insert(path.into(), Some(lines::remove(&text, &added)));
            }
        }
        return;
    };
    for Changed { path, added } in &record.files {
        let text = files.get(path).cloned().flatten().filter(|_| !added.is_empty());
        files.insert(path.clone(), text.map(|text| lines::remove(&text, added)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wants() -> Wants {
        let reverse = vec![network("10.0.0.0/8").unwrap()];
        Wants { domain: "cluster.local".into(), server: "169.254.96.16:53".parse().unwrap(), reverse }
    }

    fn files(list: &[(&str, &str)]) -> Files {
        let mut all: Files = LOOKED_AT.iter().map(|path| ((*path).to_owned(), None)).collect();
        all.extend(list.iter().map(|(path, text)| ((*path).to_owned(), Some((*text).to_owned()))));
        all
    }

    #[test]
    fn texts() {
        assert_eq!(
            wants().plain(),
            HEAD.to_owned()
                + "server=/cluster.local/169.254.96.16\nrev-server=10.0.0.0/8,169.254.96.16\n\
                   rebind-domain-ok=/cluster.local/\nexcept-interface=weft0\n"
        );
        assert_eq!(
            wants().resolved(),
            HEAD.to_owned() + "[Resolve]\nDNS=169.254.96.16\nDomains=~cluster.local ~10.in-addr.arpa\n"
        );
        let other = Wants { server: "10.9.9.9:5353".parse().unwrap(), ..wants() };
        assert!(other.plain().contains("server=/cluster.local/10.9.9.9#5353\n"));
        assert!(other.resolved().contains("DNS=10.9.9.9:5353\n"));
        let zones = |net: &str| zones(&network(net).unwrap()).collect::<Vec<_>>();
        assert_eq!(zones("10.43.0.0/16"), ["43.10.in-addr.arpa"]);
        assert_eq!((zones("10.96.0.0/12").len(), zones("10.96.0.0/12")[15].as_str()), (16, "111.10.in-addr.arpa"));
        assert_eq!(zones("192.0.2.8/31"), ["8.2.0.192.in-addr.arpa", "9.2.0.192.in-addr.arpa"]);
    }

    #[test]
    fn undone_is_as_before_whatever_was_there() {
        let plain = ("/etc/default/dnsmasq", "CONFIG_DIR=/etc/dnsmasq.d,.dpkg-dist\n");
        let worlds = [
            (vec![Resolver::Uci], files(&[(UCI, "config dnsmasq\n\toption x 1\n")])),
            (vec![Resolver::Dnsmasq], files(&[(DNSMASQ, "bind-dynamic")])),
            (vec![Resolver::Dnsmasq], files(&[(DNSMASQ, "conf-dir=/etc/dnsmasq.d/,*.conf\n")])),
            (vec![Resolver::Dnsmasq, Resolver::Resolved], files(&[plain, (DNSMASQ, "#conf-dir=/etc/dnsmasq.d\n")])),
            (vec![Resolver::Dnsmasq], files(&[])),
        ];
        for (resolvers, before) in worlds {
            let mut now = before.clone();
            let record = apply(&mut now, &resolvers, &wants()).unwrap();
            assert_ne!(now, before);
            let mut again = now.clone();
            revert(&mut again, Some(&record), &wants());
            assert_eq!(again, before, "{resolvers:?}");
            let twice = apply(&mut again, &resolvers, &wants()).unwrap();
            assert_eq!((&again, twice), (&now, record), "twice is once");
            revert(&mut now, None, &wants());
            // Of a dnsmasq.conf that was not there an empty one stays, where nobody knows.
            now.retain(|path, text| path != DNSMASQ || text.as_deref() != Some(""));
            let before: Files = before.into_iter().filter(|(p, _)| now.contains_key(p)).collect();
            assert_eq!(now, before, "without a record: {resolvers:?}");
        }
    }

    #[test]
    fn files_of_others_stay() {
        let mut theirs = files(&[(DNSMASQ_DROP_IN, "server=1.1.1.1\n"), (UCI, "config dhcp lan\n")]);
        assert!(apply(&mut theirs, &[Resolver::Dnsmasq], &wants()).unwrap_err().contains("move it away"));
        assert!(apply(&mut theirs, &[Resolver::Uci], &wants()).unwrap_err().contains("no section"));
    }
}
