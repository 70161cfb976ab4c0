//! Counters: plain cells, one thread (MIPS32 has no `AtomicU64`). The doc comment of a field is its help text.

use std::cell::Cell;

macro_rules! counters {
    ($(#[$top:meta])* $name:ident, $prefix:literal { $($(#[doc = $help:literal])+ $field:ident,)* }) => {
        $(#[$top])*
        #[derive(Debug, Default)]
        pub struct $name { $($(#[doc = $help])+ pub $field: Cell<u64>,)* }
        impl $name {
            /// (name, help, value) of each counter, in the order of the source.
            pub fn each(&self) -> impl Iterator<Item = (&'static str, &'static str, u64)> + '_ {
                [$((concat!($prefix, "_", stringify!($field)), concat!($($help),+).trim_ascii(), self.$field.get()),)*].into_iter()
            }
        }
    };
}

/// Adds one.
pub fn bump(counter: &Cell<u64>) {
    add(counter, 1);
}

pub fn add(counter: &Cell<u64>, by: u64) {
    counter.set(counter.get().wrapping_add(by));
}

counters! {
    /// What the DNS responder counts.
    DnsCounters, "dns" {
        /// Queries received.
        queries,
        /// Queries answered from the table.
        answered,
        /// Queries sent on to an upstream.
        forwarded,
        /// Answers from the cache.
        cached,
        /// Queries that no upstream answered.
        upstream_timeouts,
        /// Messages that are not a query we can read.
        malformed,
        /// Queries dropped because too many were pending.
        overflow,
        /// Queries and connections that came by an interface whose clients are not served.
        refused,
    }
}

counters! {
    /// What the proxy counts.
    ProxyCounters, "proxy" {
        /// Connections accepted.
        accepted,
        /// Connections closed at once because they were not redirected to a known VIP.
        refused_surface,
        /// Connections refused because max_connections was reached.
        refused_full,
        /// Connections that found no endpoint.
        no_endpoint,
        /// Connects that failed and were tried on another endpoint.
        retries,
        /// Connections on which every endpoint failed.
        failed,
        /// Times that an endpoint was left out because it failed.
        ejections,
        /// Tries of this node's endpoints while no API server said how they are.
        probes,
        /// Those that the endpoint did not take.
        probe_failures,
        /// Bytes from clients to endpoints.
        bytes_up,
        /// Bytes from endpoints to clients.
        bytes_down,
        /// Streams opened by peers for our endpoints.
        remote_opens,
        /// Streams of peers refused because the endpoint is not ours.
        remote_refused,
        /// Sessions of clients of UDP Services begun.
        udp_sessions,
        /// Datagrams of UDP Services dropped: a queue or a socket was full, or they are too large for the way.
        udp_drops,
        /// Flows of UDP deleted from conntrack because they led elsewhere than the rules.
        udp_flows_deleted,
        /// Rule sets written to the kernel.
        rule_syncs,
        /// Rule sets that the kernel refused.
        rule_errors,
    }
}

counters! {
    /// What the tunnel counts.
    TunnelCounters, "tunnel" {
        /// Datagrams received.
        rx_datagrams,
        /// Bytes received in datagrams.
        rx_bytes,
        /// Datagrams sent.
        tx_datagrams,
        /// Bytes sent in datagrams.
        tx_bytes,
        /// Datagrams that the kernel refused to send.
        send_errors,
        /// Datagrams dropped: first byte of no known frame.
        unknown_first_byte,
        /// Initials dropped: foreign QUIC version or an old psk epoch.
        foreign_version,
        /// Initials dropped: destination CID under 8 bytes, or one that does not name our key.
        foreign_dcid,
        /// Initials dropped: they do not open under our key and psk.
        initial_undecryptable,
        /// Long-header packets of no connection that are no Initial.
        stray_long_header,
        /// Short-header packets whose CID is none of ours.
        stray_short_header,
        /// Handshakes refused: certificate of another CA, expired, or not for the key.
        bad_certificate,
        /// Handshakes finished.
        handshakes,
        /// Handshakes that failed or timed out.
        handshake_failures,
        /// Initials answered with Retry because too many handshakes were half open.
        retries_sent,
        /// Relay frames whose tag did not fit.
        relay_rejects,
        /// Relay control messages that did not open or were replayed.
        control_rejects,
        /// Disco messages that did not open or came the wrong way.
        disco_rejects,
        /// LAN beacons that did not open or came from off the link.
        beacon_rejects,
        /// Datagrams relayed for others.
        relayed_datagrams,
        /// Bytes relayed for others.
        relayed_bytes,
        /// Relay frames of no flow, or of one whose other end is gone.
        relay_unknown_flows,
        /// Datagrams not relayed, questions and registrations of nodes dropped: more than a node may.
        relay_over_rate,
        /// Datagrams not relayed: too many were waiting.
        relay_drops,
        /// Datagrams not relayed: they and those behind them had waited too long.
        relay_late,
        /// TCP connections to the relay that showed no psk of ours, in time or at all.
        tcp_strangers,
        /// Nodes that came by TCP and were turned away: too many.
        tcp_full,
        /// Datagrams dropped because a TCP connection was full.
        tcp_drops,
        /// Datagrams of UDP Services that were too large for one packet, each sent as a stream of its own.
        udp_streams,
        /// Datagrams of UDP Services dropped at either end: too many bytes of them waited.
        udp_full,
        /// Large datagrams of UDP Services given up at either end: they were not whole in time.
        udp_late,
        /// Streams of peers dropped: no datagram, a malformed one, or one of no session.
        udp_strays,
        /// Handshakes put off: the budget for public-key work or the room for them was used up.
        budget_exceeded,
        /// Connections closed because there were too many.
        connections_displaced,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_help_and_values() {
        let c = DnsCounters::default();
        bump(&c.queries);
        add(&c.queries, 2);
        assert_eq!(c.each().next(), Some(("dns_queries", "Queries received.", 3)));
    }
}
