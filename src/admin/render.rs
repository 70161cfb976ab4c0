//! The views as text for people.

use super::view::{Peers, Resolution, Service, Services, Status};
use std::fmt::Write as _;

/// Columns as wide as their widest cell; the last one is not padded.
pub fn table<const N: usize>(head: [&str; N], rows: impl IntoIterator<Item = [String; N]>) -> String {
    let rows: Vec<[String; N]> = std::iter::once(head.map(String::from)).chain(rows).collect();
    let mut out = String::new();
    let width: [usize; N] =
        std::array::from_fn(|column| rows.iter().map(|r| r[column].chars().count()).max().unwrap_or(0));
    for row in &rows {
        let cells: Vec<_> = row.iter().zip(width).map(|(cell, width)| format!("{:width$}", printable(cell))).collect();
        out.push_str(cells.join("  ").trim_end());
        out.push('\n');
    }
    out
}

#[must_use]
pub fn status(s: &Status) -> String {
    let mut out = String::new();
    let mut line = |name: &str, text: String| {
        let _ = writeln!(out, "{name:<10}{}", printable(&text));
    };
    line("node", format!("{} (weft {}, pid {}, up {})", s.node, s.version, s.pid, span(s.uptime_secs)));
    let synced = if s.synced { "" } else { ", not complete yet" };
    line("table", format!("{} services, {} endpoints, {} nodes{synced}", s.services, s.endpoints, s.nodes));
    for source in &s.sources {
        let since = match (source.synced, source.since_secs) {
            (_, None) => String::new(),
            (true, Some(secs)) => format!(", synced for {}", span(secs)),
            (false, Some(secs)) => format!(", not synced for {}", span(secs)),
        };
        let state = match (source.error.as_str(), source.synced) {
            ("", true) => since,
            ("", false) if since.is_empty() => ", not read yet".into(),
            ("", false) => since,
            (error, _) => format!("{since}, {error}"),
        };
        line("source", format!("{}: {} objects{state}", source.name, source.objects));
    }
    for part in &s.parts {
        line(&part.name, format!("{}{}", if part.on { "" } else { "off: " }, part.note));
    }
    for relay in &s.relays {
        let state = if relay.registered { "registered" } else { "not registered" };
        let note = if relay.note.is_empty() { String::new() } else { format!(", {}", relay.note) };
        line("relay", format!("{} at {}: {state}, rtt {}{note}", relay.name, relay.address, rtt(relay.rtt_ms)));
    }
    if let Some(r) = &s.relaying {
        let drops: Vec<_> = r.drops.iter().filter(|(_, n)| **n > 0).map(|(why, n)| format!("{n} {why}")).collect();
        let drops = if drops.is_empty() { "nothing".into() } else { drops.join(", ") };
        let waits =
            if r.queued_bytes > 0 { format!(", {} waiting", size(r.queued_bytes as u64)) } else { String::new() };
        line("relaying", format!("for {} nodes, the first relay of {}, in {} flows", r.nodes, r.firsts, r.flows));
        line("relayed", format!("{} in {} datagrams{waits}; dropped: {drops}", size(r.bytes), r.datagrams));
    }
    line("peers", format!("{} with a path", s.peers));
    for (name, value) in s.counters.iter().filter(|(_, value)| **value > 0) {
        let _ = writeln!(out, "  {name:<30} {value}");
    }
    for warning in &s.warnings {
        let _ = writeln!(out, "warning: {}", printable(warning));
    }
    out
}

#[must_use]
pub fn peers(p: &Peers) -> String {
    if p.peers.is_empty() {
        return "no peers\n".into();
    }
    let rows = p.peers.iter().map(|p| {
        let bytes = (size(p.tx_bytes), size(p.rx_bytes));
        [
            p.name.clone(),
            p.path.clone(),
            p.via.clone(),
            rtt(p.rtt_ms),
            span(p.since_secs),
            p.streams.to_string(),
            bytes.0,
            bytes.1,
            p.note.clone(),
        ]
    });
    table(["PEER", "PATH", "VIA", "RTT", "SINCE", "STREAMS", "SENT", "RECEIVED", "NOTE"], rows)
}

#[must_use]
pub fn services(s: &Services) -> String {
    if s.services.is_empty() {
        return "no services\n".into();
    }
    if s.services.iter().all(|s| s.endpoints.is_some()) {
        return s.services.iter().map(details).collect::<Vec<_>>().join("\n");
    }
    let rows = s.services.iter().map(|s| {
        [
            s.namespace.clone(),
            s.name.clone(),
            s.kind.clone(),
            addresses(s),
            ports(s),
            format!("{}/{}", s.ready, s.total),
        ]
    });
    table(["NAMESPACE", "NAME", "KIND", "ADDRESS", "PORTS", "READY"], rows)
}

#[must_use]
pub fn resolution(r: &Resolution) -> String {
    let mut out = String::new();
    for a in &r.answers {
        let _ = writeln!(out, "{}  {}  {}  {}", printable(&a.name), a.ttl, a.kind, printable(&a.data));
    }
    if r.answers.is_empty() {
        let why = match r.code.as_str() {
            "NOERROR" => "NODATA: the name exists, without records of these kinds",
            "FORWARD" => "not a name of the cluster: the upstream servers answer it",
            code => code,
        };
        let _ = writeln!(out, "{}: {}", printable(&r.name), printable(why));
    }
    out
}

fn details(s: &Service) -> String {
    let mut out = String::new();
    let _ = writeln!(out, "{}/{}  {}  {}  {}", s.namespace, s.name, s.kind, addresses(s), ports(s));
    if let Some(sticky) = s.sticky_secs {
        let _ = writeln!(out, "clients stay with their endpoint for {}", span(sticky));
    }
    for port in s.ports.iter().filter(|_| s.target.is_none() && !s.ips.is_empty()) {
        let _ = writeln!(out, "port {}/{}: {}", port.port, port.protocol, printable(&port.policy));
    }
    if let Some(rule) = &s.rule {
        let no = s.not_done.as_ref().map_or_else(String::new, |no| format!("; not done: {no}"));
        let _ = writeln!(out, "DestinationRule {}", printable(&format!("{rule}{no}")));
    }
    let endpoints = s.endpoints.as_deref().unwrap_or_default();
    if endpoints.is_empty() {
        out.push_str("no endpoints\n");
        return out;
    }
    let rows = endpoints.iter().map(|e| {
        let ports: Vec<_> = e.ports.iter().map(ToString::to_string).collect();
        let state = match (e.ejected_secs, e.ready, e.terminating) {
            _ if e.silent => "takes no probe, left out".into(),
            (Some(secs), ..) => format!("fails, left out for {}", span(secs)),
            (None, true, _) => "ready".into(),
            (None, false, true) => "terminating".into(),
            (None, false, false) => "not ready".into(),
        };
        let name = |name: &Option<String>| name.clone().unwrap_or_else(|| "-".into());
        [
            e.address.clone(),
            ports.join(","),
            name(&e.node),
            name(&e.zone),
            if e.near.is_empty() { "-".into() } else { e.near.clone() },
            name(&e.hostname),
            format!("{}/{}", e.live, e.connections),
            e.failures.to_string(),
            state,
        ]
    });
    out.push_str(&table(
        ["ENDPOINT", "PORTS", "NODE", "ZONE", "NEAR", "HOSTNAME", "LIVE/ALL", "FAILED", "STATE"],
        rows,
    ));
    out
}

fn addresses(s: &Service) -> String {
    match &s.target {
        Some(target) => target.clone(),
        None if s.ips.is_empty() => "none".into(),
        None => [&s.ips[..], &s.external_ips].concat().join(","),
    }
}

fn ports(s: &Service) -> String {
    let ports = s.ports.iter().map(|p| {
        let name = if p.name.is_empty() { String::new() } else { format!("{}:", p.name) };
        format!("{name}{}/{}", p.port, p.protocol)
    });
    ports.collect::<Vec<_>>().join(",")
}

fn rtt(ms: Option<u32>) -> String {
    ms.map_or_else(|| "-".into(), |ms| format!("{ms} ms"))
}

/// `3h07m`.
fn span(secs: u64) -> String {
    match secs {
        0..60 => format!("{secs}s"),
        60..3_600 => format!("{}m{:02}s", secs / 60, secs % 60),
        3_600..86_400 => format!("{}h{:02}m", secs / 3_600, secs / 60 % 60),
        _ => format!("{}d{:02}h", secs / 86_400, secs / 3_600 % 24),
    }
}

/// `1.5 MB`, in powers of ten.
fn size(bytes: u64) -> String {
    let units = ["kB", "MB", "GB", "TB", "PB", "EB"];
    let mut tenths = u128::from(bytes) * 10;
    let mut unit = "B";
    for next in units {
        if tenths < 10_000 {
            break;
        }
        tenths /= 1_000;
        unit = next;
    }
    if unit == "B" { format!("{bytes} B") } else { format!("{}.{} {unit}", tenths / 10, tenths % 10) }
}

/// Names come from others; a terminal must not obey them.
fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_and_sizes() {
        let spans = [(0, "0s"), (59, "59s"), (60, "1m00s"), (3_599, "59m59s"), (3_661, "1h01m"), (90_000, "1d01h")];
        for (secs, text) in spans {
            assert_eq!(span(secs), text);
        }
        let sizes = [
            (0, "0 B"),
            (999, "999 B"),
            (1_000, "1.0 kB"),
            (1_999, "1.9 kB"),
            (100_000_000, "100.0 MB"),
            (u64::MAX, "18.4 EB"),
        ];
        for (bytes, text) in sizes {
            assert_eq!(size(bytes), text);
        }
    }

    #[test]
    fn columns_line_up_and_control_characters_are_gone() {
        let rows = [["é".to_owned(), "x\u{1b}[2J".to_owned()], ["long".to_owned(), "y".to_owned()]];
        assert_eq!(table(["A", "B"], rows), "A     B\né     x\u{fffd}[2J\nlong  y\n");
    }
}
