//! A DestinationRule's JSON -> what we do of it, and the names of what we do not. Whatever the API accepts is read: a field
//! that is not done is named, and everything else counts.

use super::{convert::Intern, watcher::value_end};
use crate::table::{
    model::ServiceId,
    rule::{self, Choice, Number, Rule, Traffic},
};
use nanoserde::DeJson;
use std::rc::Rc;

/// Bytes of the names of fields that are not done; those beyond are not named.
const NOT_DONE_MAX: usize = 200;

/// Ports with a policy of their own; those beyond get what the rule says of all.
const PORTS_MAX: usize = 64;

/// Bytes of a header's name or of a path to a field; a longer header is not done.
const TEXT_MAX: usize = 128;

/// What a leaf below `trafficPolicy` becomes.
enum Leaf {
    /// Nothing: it makes no difference here.
    Accept,
    Number(Number),
    /// A count of failures; the least counts, and 0 alone is never.
    Failures,
    Time(Number),
    Simple,
    Header,
    SourceIp,
    /// What only this value means to us.
    Only(&'static str),
}

const LEAVES: [(&str, Leaf); 22] = [
    ("loadBalancer.simple", Leaf::Simple),
    ("loadBalancer.consistentHash.httpHeaderName", Leaf::Header),
    ("loadBalancer.consistentHash.useSourceIp", Leaf::SourceIp),
    // One algorithm does for all sizes.
    ("loadBalancer.consistentHash.minimumRingSize", Leaf::Accept),
    ("loadBalancer.consistentHash.ringHash.minimumRingSize", Leaf::Accept),
    ("loadBalancer.consistentHash.maglev.tableSize", Leaf::Accept),
    ("connectionPool.tcp.maxConnections", Leaf::Number(Number::Connections)),
    ("connectionPool.tcp.connectTimeout", Leaf::Time(Number::ConnectMs)),
    ("connectionPool.tcp.idleTimeout", Leaf::Time(Number::IdleMs)),
    ("connectionPool.tcp.maxConnectionDuration", Leaf::Time(Number::LifeMs)),
    ("connectionPool.tcp.tcpKeepalive.time", Leaf::Time(Number::KeepaliveMs)),
    ("connectionPool.tcp.tcpKeepalive.interval", Leaf::Time(Number::KeepaliveEveryMs)),
    ("connectionPool.tcp.tcpKeepalive.probes", Leaf::Number(Number::KeepaliveProbes)),
    ("outlierDetection.consecutiveErrors", Leaf::Failures),
    ("outlierDetection.consecutive5xxErrors", Leaf::Failures),
    ("outlierDetection.consecutiveGatewayErrors", Leaf::Failures),
    ("outlierDetection.consecutiveLocalOriginFailures", Leaf::Failures),
    // Endpoints are ejected at the failure, not at the next look at all.
    ("outlierDetection.interval", Leaf::Accept),
    ("outlierDetection.baseEjectionTime", Leaf::Time(Number::EjectMs)),
    ("outlierDetection.maxEjectionPercent", Leaf::Number(Number::EjectPercent)),
    ("tls.mode", Leaf::Only("DISABLE")),
    ("connectionPool.http.h2UpgradePolicy", Leaf::Only("DO_NOT_UPGRADE")),
];

struct Reading<'n, 'i> {
    names: Intern<'n>,
    not_done: &'i mut String,
    traffic: Traffic,
}

/// Reads compact JSON that has passed the scanner.
pub(super) fn read(id: ServiceId, text: &str, names: Intern<'_>) -> Rule {
    let (mut created, mut host, mut private, mut not_done) = ("", None, false, String::new());
    let (mut policy, mut exports) = ("", 0);
    each(text, &mut |key, value| match key {
        "metadata" => each(value, &mut |key, value| {
            if key == "creationTimestamp" && value.len() < TEXT_MAX {
                created = value.trim_matches('"');
            }
        }),
        "spec" => each(value, &mut |key, value| match key {
            "host" => {
                let name = String::deserialize_json(value).unwrap_or_default();
                host = rule::host(&name, &id.namespace, names).filter(|h| h.namespace.len() + h.name.len() < 255);
                if name.contains('*') {
                    note(&mut not_done, "host with a wildcard");
                }
            }
            "trafficPolicy" => policy = value,
            "exportTo" => each(value, &mut |_, to| {
                exports += 1;
                private = exports == 1 && to == "\".\"";
                if to != "\".\"" && to != "\"*\"" {
                    note(&mut not_done, "exportTo");
                }
            }),
            // What is in a selector has not come so far.
            "subsets" | "workloadSelector" if value != "null" && value != "[]" => note(&mut not_done, key),
            _ => {}
        }),
        _ => {}
    });
    let mut lists = Vec::new();
    let traffic = traffic(policy, names, &mut not_done, &mut lists);
    let mut ports = Vec::new();
    for (port, policy) in lists {
        if ports.len() < PORTS_MAX {
            ports.push((port, self::traffic(policy, names, &mut not_done, &mut Vec::new())));
        }
    }
    let (created, not_done) = (names(created), not_done.as_str().into());
    Rule { id, host, created, private, traffic, ports: ports.into(), not_done }
}

fn traffic<'t>(
    text: &'t str,
    names: Intern<'_>,
    not_done: &mut String,
    ports: &mut Vec<(u16, &'t str)>,
) -> Rc<Traffic> {
    let mut reading = Reading { names, not_done, traffic: Traffic::default() };
    each(text, &mut |key, value| match key {
        "portLevelSettings" => each(value, &mut |_, setting| {
            let mut number = 0;
            each(setting, &mut |key, port| {
                if key == "port" {
                    each(port, &mut |_, n| number = n.parse().unwrap_or(0));
                }
            });
            ports.push((number, setting));
        }),
        // Of a port's settings: which it is.
        "port" => {}
        _ => reading.member(key, value),
    });
    Rc::new(reading.traffic)
}

impl Reading<'_, '_> {
    fn member(&mut self, path: &str, value: &str) {
        if path.len() > TEXT_MAX {
            return note(self.not_done, "a field with a long name");
        }
        if value.starts_with('{') {
            return each(value, &mut |key, value| self.member(&format!("{path}.{key}"), value));
        }
        if value != "null" && value != "[]" && !self.leaf(path, value) {
            note(self.not_done, path);
        }
    }

    /// False: it is not done.
    fn leaf(&mut self, path: &str, value: &str) -> bool {
        let Some((_, leaf)) = LEAVES.iter().find(|(known, _)| *known == path) else {
            if path.starts_with("loadBalancer.consistentHash.http") {
                self.traffic.choice.get_or_insert(Choice::RoundRobin);
            }
            return false;
        };
        let text = value.trim_matches('"');
        let numbers = &mut self.traffic.numbers;
        match leaf {
            Leaf::Accept => {}
            Leaf::Number(which) => match value.parse::<f64>() {
                #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "`as` saturates")]
                Ok(number) => numbers[*which as usize] = number as u32,
                Err(_) => return false,
            },
            Leaf::Failures => {
                let Ok(said) = value.parse::<u32>() else { return false };
                let held = &mut numbers[Number::Failures as usize];
                let never = |n| if n == 0 { u32::MAX } else { n };
                *held = if *held == 0 { never(said) } else { (*held).min(never(said)) };
            }
            Leaf::Time(which) => match millis(text) {
                Some(ms) => numbers[*which as usize] = ms,
                None => return false,
            },
            Leaf::Simple => {
                self.traffic.choice = match text {
                    "UNSPECIFIED" => None,
                    "RANDOM" => Some(Choice::Random),
                    "LEAST_REQUEST" | "LEAST_CONN" => Some(Choice::LeastRequest),
                    _ => Some(Choice::RoundRobin),
                };
                if matches!(self.traffic.choice, Some(Choice::RoundRobin)) && text != "ROUND_ROBIN" {
                    let said: String = text.chars().take(32).collect();
                    note(self.not_done, format!("{path} {said}").trim_ascii_end());
                }
            }
            Leaf::Header => {
                let name = text.to_ascii_lowercase();
                if name.is_empty() || name.len() > TEXT_MAX || name.contains('\\') {
                    return false;
                }
                self.traffic.choice = Some(Choice::Header((self.names)(&name)));
            }
            Leaf::SourceIp => {
                if value == "true" {
                    self.traffic.choice = Some(Choice::SourceIp);
                }
            }
            Leaf::Only(only) => return text == *only,
        }
        true
    }
}

/// Adds a name that is not there yet.
fn note(not_done: &mut String, name: &str) {
    let safe: String = name.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    if not_done.split(", ").any(|n| n == safe) || not_done.ends_with("...") {
        return;
    }
    let comma = if not_done.is_empty() { "" } else { ", " };
    let fits = not_done.len() + safe.len() + 2 <= NOT_DONE_MAX;
    *not_done += comma;
    *not_done += if fits { &safe } else { "..." };
}

/// Whole milliseconds of a duration as Go and protobuf write it: `1h2m`, `1.5s`, `250ms`. What is less than one is one.
fn millis(text: &str) -> Option<u32> {
    let (mut rest, mut sum) = (text, 0.0);
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, unit) = rest.split_at(digits);
        let end = unit.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(unit.len());
        let (unit, after) = unit.split_at(end);
        let factor = match unit {
            "h" => 3_600_000.0,
            "m" => 60_000.0,
            "s" => 1_000.0,
            "ms" => 1.0,
            "us" | "\u{b5}s" => 0.001,
            "ns" => 0.000_001,
            _ => return None,
        };
        sum += number.parse::<f64>().ok()? * factor;
        rest = after;
    }
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "it is clamped, and digits alone are in it"
    )]
    (sum > 0.0).then(|| sum.clamp(1.0, f64::from(u32::MAX)) as u32)
}

/// The members of an object, or the elements of a list with no key, of compact JSON.
fn each<'t>(text: &'t str, then: &mut dyn FnMut(&'t str, &'t str)) {
    let bytes = text.as_bytes();
    let is_object = match bytes.first() {
        Some(b'{') => true,
        Some(b'[') => false,
        _ => return,
    };
    let mut at = 1;
    while bytes.get(at).is_some_and(|b| !matches!(b, b'}' | b']')) {
        let mut key = "";
        if is_object {
            let end = value_end(bytes, at);
            key = text.get(at..end).unwrap_or_default().trim_matches('"');
            at = end + 1;
        }
        let end = value_end(bytes, at);
        then(key, text.get(at..end).unwrap_or_default());
        at = end + usize::from(bytes.get(end) == Some(&b','));
    }
}
