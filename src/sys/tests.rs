//! The system calls against the kernel that is there.

use super::*;
use std::io::{Read, Write};

fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (client, listener.accept().unwrap().0)
}

#[test]
fn peeked_bytes_are_discarded_and_no_more() {
    let (mut client, mut server) = pair();
    client.write_all(b"0123456789").unwrap();
    let mut buffer = [0; 4];
    assert_eq!(server.peek(&mut buffer).unwrap(), 4);
    assert_eq!(discard(&server, 4).unwrap(), 4);
    drop(client);
    let mut rest = String::new();
    server.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "456789");
}

#[test]
fn a_reset_is_seen_as_one() {
    let (client, mut server) = pair();
    reset_on_close(&client).unwrap();
    drop(client);
    assert_eq!(server.read(&mut [0; 4]).unwrap_err().kind(), io::ErrorKind::ConnectionReset);
}

#[test]
fn a_connection_that_nobody_redirected_has_no_other_destination() {
    let (_client, server) = pair();
    let here = server.local_addr().unwrap();
    assert!(original_dst(&server).map_or(true, |to| to == here));
}

#[test]
fn interfaces_are_told_of_both_families_and_transports() {
    let lo = crate::links::index("lo").unwrap();
    for address in ["127.0.0.1:0", "[::1]:0"] {
        let address: SocketAddr = address.parse().unwrap();
        let Ok(udp) = UdpSocket::bind(address) else {
            assert!(address.is_ipv6(), "a host without IPv6");
            continue;
        };
        tell_interfaces(&udp, address.is_ipv4()).unwrap();
        let client = UdpSocket::bind(address).unwrap();
        client.connect(udp.local_addr().unwrap()).unwrap();
        udp.set_nonblocking(true).unwrap();
        let mut batch = Batch::default();
        for round in 0..3 {
            for i in 0..20_u8 {
                client.send(&[i; 5]).unwrap();
            }
            let mut seen = Vec::new();
            while seen.len() < 20 {
                if batch.receive(&udp).is_err() {
                    continue; // not there yet
                }
                batch.each(|message, from, interface, out| {
                    assert_eq!((message.len(), from, interface), (5, client.local_addr().unwrap(), lo));
                    seen.push(message[0]);
                    out.clear();
                    out.extend_from_slice(&[message[0], round]);
                    message[0] % 3 != 1
                });
                batch.send(&udp).unwrap();
            }
            assert_eq!(seen, (0..20).collect::<Vec<_>>());
            for i in (0..20).filter(|i| i % 3 != 1) {
                let mut got = [0; 8];
                assert_eq!((client.recv(&mut got).unwrap(), got[..2].to_vec()), (2, vec![i, round]));
            }
        }
        assert_eq!(batch.receive(&udp).unwrap_err().kind(), io::ErrorKind::WouldBlock);

        let listener = tcp_listener(&address).unwrap();
        listener.set_nonblocking(false).unwrap();
        tell_interfaces(&listener, address.is_ipv4()).unwrap();
        let _client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        assert_eq!(interface_of(&listener.accept().unwrap().0).unwrap(), lo);
    }
}

#[test]
fn binds_before_the_address_exists() {
    // TEST-NET-1 (RFC 5737) is never ours.
    let listener = tcp_listener(&"192.0.2.77:0".parse().unwrap()).unwrap();
    assert_ne!(listener.local_addr().unwrap().port(), 0);
    udp_socket(&"192.0.2.77:0".parse().unwrap()).unwrap();
}

#[test]
fn splice_moves_bytes_and_sees_the_end() {
    let (mut client, server) = pair();
    server.set_nonblocking(true).unwrap();
    let (out, into) = pipe(4096).unwrap();
    assert_eq!(splice(&server, &into, 100).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    client.write_all(b"hello").unwrap();
    let moved = loop {
        match splice(&server, &into, 100) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => std::thread::yield_now(),
            other => break other.unwrap(),
        }
    };
    assert_eq!(moved, 5);
    assert_eq!(splice(&out, &server, moved).unwrap(), 5);
    let mut back = [0; 5];
    client.read_exact(&mut back).unwrap();
    assert_eq!(&back, b"hello");
}

#[test]
fn the_limit_of_files_never_falls() {
    let first = raise_nofile().unwrap();
    assert!(first > 0 && raise_nofile().unwrap() >= first);
}
