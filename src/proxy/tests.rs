use super::*;
use crate::reactor::block_on;
use std::io::{Read, Write};

#[test]
fn early_bytes_are_sent_on_and_stay_in_the_socket() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let mut socket = listener.accept().unwrap().0;
    socket.set_nonblocking(true).unwrap();
    let (pool, mut stream) = (Pool::default(), Vec::new());
    assert_eq!(block_on(early(&pool, &socket, &mut stream)), Early::Nothing);
    client.write_all(b"GET /").unwrap();
    while block_on(early(&pool, &socket, &mut stream)) == Early::Nothing {}
    assert_eq!(stream, b"GET /");
    assert_eq!(block_on(early(&pool, &socket, &mut stream)), Early::Sent(5));
    client.write_all(b" HTTP").unwrap();
    drop(client);
    pump::take(&socket, 5).unwrap();
    socket.set_nonblocking(false).unwrap();
    let mut rest = String::new();
    socket.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, " HTTP");
    assert_eq!(block_on(early(&pool, &socket, &mut stream)), Early::Never);
}
