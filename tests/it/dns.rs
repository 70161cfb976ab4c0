//! The DNS server with real sockets on loopback.
