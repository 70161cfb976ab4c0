//! TLS 1.3 around the Noise stream, where nothing else passes. Without IO: the stream below is the caller's.
//!
//! It hides and proves little: who is who the Noise inside tells. Its raw public key (RFC 7250) follows from the psk and
//! the relay's key, so both ends know it from their bundles; and the ClientHello carries a proof of the psk among its
//! ALPN names, without which the relay does not answer with a byte.

use crate::encoding::HEXLOWER;
use crate::tunnel::{Key, derive};
use futures_lite::{AsyncRead, AsyncWrite, ready};
use ring::hmac;
use rustls::{
    ClientConfig, ClientConnection, Connection, DigitallySignedStruct, Error, ServerConfig, SignatureScheme,
    client::{
        Resumption,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, ring as provider, verify_tls13_signature_with_raw_key},
    pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName, SubjectPublicKeyInfoDer, UnixTime},
    server::{Acceptor, AlwaysResolvesServerRawPublicKeys, NoServerSessionStorage},
    sign::{CertifiedKey, SigningKey},
    version::TLS13,
};
use std::{
    io::{self, Read, Write},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

/// The first byte of a TLS handshake record, RFC 8446 section 5.1.
pub const FIRST_BYTE: u8 = 22;
/// A ClientHello of ours has a quarter of it; who sends more before it is whole is a stranger.
pub const HELLO_MAX: usize = 2048;
/// Plain bytes that wait for TLS, each way.
const BUFFER: usize = 32 << 10;
/// Of one write.
const WRITE_MOST: usize = 16 << 10;
/// RFC 8410 section 7, before the seed: PrivateKeyInfo of an Ed25519 key.
const PKCS8: [u8; 16] = [0x30, 0x2e, 2, 1, 0, 0x30, 5, 6, 3, 0x2b, 0x65, 0x70, 4, 0x22, 4, 0x20];
const NONCE: usize = 16;
const PROOF: usize = 2 * (NONCE + 32);
/// What others call what they speak above TLS.
const USUAL: &[u8] = b"http/1.1";

fn signing_key(relay: &[u8; 32], psk: &Key) -> Result<Arc<dyn SigningKey>, Error> {
    let seed = derive(psk, b"tls key", relay);
    let der = zeroize::Zeroizing::new([&PKCS8[..], &seed.0].concat());
    provider::sign::any_eddsa_type(&PrivatePkcs8KeyDer::from(&der[..]))
}

fn proof_key(relay: &[u8; 32], psk: &Key) -> hmac::Key {
    hmac::Key::new(hmac::HMAC_SHA256, &derive(psk, b"tls hello", relay).0)
}

fn public_key(key: &dyn SigningKey) -> Result<Vec<u8>, Error> {
    key.public_key().map(|key| key.to_vec()).ok_or_else(|| Error::General("a key without a public half".into()))
}

/// Takes one key and nothing else.
#[derive(Debug)]
struct Pinned {
    key: Vec<u8>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        key: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let ours = **key == self.key[..];
        ours.then(ServerCertVerified::assertion).ok_or_else(|| Error::General("it is not the relay's key".into()))
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("TLS 1.2".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        key: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let key = SubjectPublicKeyInfoDer::from(&**key);
        verify_tls13_signature_with_raw_key(message, &key, signature, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

/// A node's end towards a relay; `host`, where it is a name, is said in the clear as every browser does.
///
/// # Errors
/// None is known.
pub fn client(relay: &[u8; 32], psk: &Key, host: &str, nonce: [u8; NONCE]) -> Result<Connection, Error> {
    let provider = Arc::new(provider::default_provider());
    let key = public_key(&*signing_key(relay, psk)?)?;
    let pinned = Pinned { key, provider: Arc::clone(&provider) };
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(pinned))
        .with_no_client_auth();
    let proof = [&nonce[..], hmac::sign(&proof_key(relay, psk), &nonce).as_ref()].concat();
    config.alpn_protocols = vec![USUAL.to_vec(), HEXLOWER.encode(&proof).into_bytes()];
    // The relay chooses none of them.
    config.check_selected_alpn = false;
    config.resumption = Resumption::disabled();
    let name =
        ServerName::try_from(host.to_owned()).map_err(|_| Error::General("the relay's host is no name".into()))?;
    ClientConnection::new(Arc::new(config), name).map(Connection::Client)
}

/// A relay's keys: one for each psk.
pub struct Server(Vec<(hmac::Key, Arc<ServerConfig>)>);

impl Server {
    /// # Errors
    /// None is known.
    pub fn new(relay: &[u8; 32], psks: &[(u8, Key)]) -> Result<Self, Error> {
        let provider = Arc::new(provider::default_provider());
        let one = |(_, psk): &(u8, Key)| {
            let key = signing_key(relay, psk)?;
            let certified = CertifiedKey::new(vec![CertificateDer::from(public_key(&*key)?)], key);
            let mut config = ServerConfig::builder_with_provider(Arc::clone(&provider))
                .with_protocol_versions(&[&TLS13])?
                .with_no_client_auth()
                .with_cert_resolver(Arc::new(AlwaysResolvesServerRawPublicKeys::new(Arc::new(certified))));
            config.session_storage = Arc::new(NoServerSessionStorage {});
            config.send_tls13_tickets = 0;
            Ok((proof_key(relay, psk), Arc::new(config)))
        };
        psks.iter().map(one).collect::<Result<_, _>>().map(Self)
    }

    fn config(&self, alpn: &[u8]) -> Option<Arc<ServerConfig>> {
        (alpn.len() == PROOF).then_some(())?;
        let proof = HEXLOWER.decode(alpn).ok()?;
        let (nonce, mac) = proof.split_at_checked(NONCE)?;
        self.0.iter().find(|(key, _)| hmac::verify(key, nonce, mac).is_ok()).map(|(_, config)| Arc::clone(config))
    }
}

/// A connection of which the ClientHello is not all there yet.
#[derive(Default)]
pub struct Greeting {
    acceptor: Acceptor,
    got: usize,
}

impl Greeting {
    /// The next bytes; None: it takes more. Until this gives a connection not a byte may be sent.
    ///
    /// # Errors
    /// A stranger.
    pub fn read(&mut self, mut bytes: &[u8], server: &Server) -> Result<Option<Connection>, &'static str> {
        const NO_TLS: &str = "it speaks no TLS that we know";
        self.got += bytes.len();
        while !bytes.is_empty() {
            self.acceptor.read_tls(&mut bytes).map_err(|_| NO_TLS)?;
            let Some(accepted) = self.acceptor.accept().map_err(|_| NO_TLS)? else { continue };
            let hello = accepted.client_hello();
            let config = hello.alpn().and_then(|mut names| names.find_map(|name| server.config(name)));
            let config = config.ok_or("it speaks TLS and has not our psk, or the relay's key is another")?;
            let connection = accepted.into_connection(config).map_err(|_| NO_TLS)?;
            // It waits for our answer before it says more.
            return if bytes.is_empty() { Ok(Some(Connection::Server(connection))) } else { Err(NO_TLS) };
        }
        if self.got > HELLO_MAX { Err("its ClientHello has no end") } else { Ok(None) }
    }
}

/// TLS on a stream. Whoever writes must read too: the handshake needs both, and until it is over [`BUFFER`] bytes are
/// all that is taken.
pub struct Tls<S> {
    inner: S,
    connection: Box<Connection>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Tls<S> {
    pub fn new(inner: S, mut connection: Connection) -> Self {
        connection.set_buffer_limit(Some(BUFFER));
        Self { inner, connection: Box::new(connection) }
    }

    /// Hands over all that TLS has to send.
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.connection.wants_write() {
            let sent = self.connection.write_tls(&mut Below { inner: &mut self.inner, cx });
            if ready!(pending(sent))? == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
        }
        Poll::Ready(Ok(()))
    }
}

/// What is not ready is an error to rustls.
struct Below<'s, 'c, 'w, S> {
    inner: &'s mut S,
    cx: &'c mut Context<'w>,
}

fn blocking<T>(poll: Poll<io::Result<T>>) -> io::Result<T> {
    match poll {
        Poll::Ready(done) => done,
        Poll::Pending => Err(io::ErrorKind::WouldBlock.into()),
    }
}

fn pending<T>(done: io::Result<T>) -> Poll<io::Result<T>> {
    match done {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Poll::Pending,
        done => Poll::Ready(done),
    }
}

impl<S: AsyncRead + Unpin> Read for Below<'_, '_, '_, S> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        blocking(Pin::new(&mut *self.inner).poll_read(self.cx, buf))
    }
}

impl<S: AsyncWrite + Unpin> Write for Below<'_, '_, '_, S> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        blocking(Pin::new(&mut *self.inner).poll_write(self.cx, buf))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for Tls<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        loop {
            match this.connection.reader().read(buf) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                // Without a close_notify the end is the same to us: a record of Noise is whole or nothing.
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Poll::Ready(Ok(0)),
                done => return Poll::Ready(done),
            }
            // Until the far end has what it waits for, nothing comes.
            if let Poll::Ready(Err(error)) = this.poll_send(cx) {
                return Poll::Ready(Err(error));
            }
            let read = this.connection.read_tls(&mut Below { inner: &mut this.inner, cx });
            let count = ready!(pending(read))?;
            let processed = this.connection.process_new_packets();
            if let Err(error) = processed {
                // The far end is told what was wrong, as far as that goes.
                let _ = this.poll_send(cx);
                return Poll::Ready(Err(io::Error::other(error)));
            }
            if count == 0 && this.connection.is_handshaking() {
                return Poll::Ready(Ok(0));
            }
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Tls<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        // Before the handshake is over rustls keeps what is written, up to its limit.
        ready!(this.poll_send(cx))?;
        let count = this.connection.writer().write(&buf[..buf.len().min(WRITE_MOST)])?;
        if let Poll::Ready(Err(error)) = this.poll_send(cx) {
            return Poll::Ready(Err(error));
        }
        if count == 0 && !buf.is_empty() { Poll::Pending } else { Poll::Ready(Ok(count)) }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_send(cx)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_close(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_lite::{AsyncReadExt, AsyncWriteExt, future};
    use std::{cell::RefCell, collections::VecDeque, rc::Rc};

    /// One end of two pipes that hold and give but a few bytes at a time.
    struct End(Rc<RefCell<VecDeque<u8>>>, Rc<RefCell<VecDeque<u8>>>);

    fn pipe() -> (End, End) {
        let (a, b) = (Rc::default(), Rc::default());
        (End(Rc::clone(&a), Rc::clone(&b)), End(b, a))
    }

    impl AsyncRead for End {
        fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<io::Result<usize>> {
            cx.waker().wake_by_ref();
            let count = buf.len().min(7);
            match self.0.borrow_mut().read(&mut buf[..count]) {
                Ok(0) => Poll::Pending,
                done => Poll::Ready(done),
            }
        }
    }

    impl AsyncWrite for End {
        fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
            cx.waker().wake_by_ref();
            let mut queue = self.1.borrow_mut();
            if queue.len() > 40 {
                return Poll::Pending;
            }
            Poll::Ready(queue.write(&buf[..buf.len().min(11)]))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    const RELAY: [u8; 32] = [5; 32];

    fn psks() -> Vec<(u8, Key)> {
        vec![(2, Key([2; 32])), (1, Key([1; 32]))]
    }

    fn hello(relay: [u8; 32], psk: u8) -> Vec<u8> {
        let mut out = Vec::new();
        client(&relay, &Key([psk; 32]), "192.0.2.1", [9; NONCE]).unwrap().write_tls(&mut out).unwrap();
        out
    }

    #[test]
    fn bytes_go_both_ways_through_narrow_pipes() {
        let server = Server::new(&RELAY, &psks()).unwrap();
        let (near, mut far) = pipe();
        let mut node = Tls::new(near, client(&RELAY, &Key([1; 32]), "relay.example", [9; NONCE]).unwrap());
        let sent: Vec<u8> = (0..100_000_u32).map(|n| (n * 7 % 251) as u8).collect();
        let there = async {
            node.write_all(b"hello").await.unwrap();
            node.flush().await.unwrap();
            node.read_exact(&mut [0; 5]).await.unwrap();
            node.write_all(&sent).await.unwrap();
            node.flush().await.unwrap();
            let mut back = vec![0; sent.len()];
            node.read_exact(&mut back).await.unwrap();
            back
        };
        let here = async {
            let (mut greeting, mut piece) = (Greeting::default(), [0; 64]);
            let connection = loop {
                let count = far.read(&mut piece).await.unwrap();
                if let Some(connection) = greeting.read(&piece[..count], &server).unwrap() {
                    break connection;
                }
            };
            let mut relay = Tls::new(far, connection);
            let (mut word, mut got) = ([0; 5], vec![0; sent.len()]);
            relay.read_exact(&mut word).await.unwrap();
            relay.write_all(&word).await.unwrap();
            relay.flush().await.unwrap();
            relay.read_exact(&mut got).await.unwrap();
            relay.write_all(&got).await.unwrap();
            relay.flush().await.unwrap();
            got
        };
        let (back, got) = future::block_on(future::zip(there, here));
        assert!(got == sent && back == sent);
    }

    #[test]
    fn a_hello_is_known_at_every_cut_and_with_either_psk() {
        let server = Server::new(&RELAY, &psks()).unwrap();
        for psk in [1, 2] {
            let hello = hello(RELAY, psk);
            assert!(hello[0] == FIRST_BYTE && hello.len() < HELLO_MAX / 2, "{}", hello.len());
            for cut in 1..hello.len() {
                let mut greeting = Greeting::default();
                assert!(matches!(greeting.read(&hello[..cut], &server), Ok(None)), "{cut}");
                assert!(matches!(greeting.read(&hello[cut..], &server), Ok(Some(_))), "{cut}");
            }
        }
    }

    #[test]
    fn strangers_get_no_connection() {
        let server = Server::new(&RELAY, &psks()).unwrap();
        let judge = |bytes: &[u8]| Greeting::default().read(bytes, &server).map(|c| c.is_some());
        assert!(judge(&hello(RELAY, 3)).unwrap_err().contains("psk"));
        assert!(judge(&hello([6; 32], 1)).unwrap_err().contains("psk"));
        let good = hello(RELAY, 1);
        for at in 0..good.len() {
            let mut changed = good.clone();
            changed[at] ^= 1;
            // Bytes that prove nothing may differ; the proof is among the ALPN names.
            let _ = judge(&changed);
        }
        let at = good.windows(USUAL.len()).position(|w| w == USUAL).unwrap() + USUAL.len() + 1;
        for at in at..at + PROOF {
            let mut changed = good.clone();
            changed[at] ^= 1;
            assert!(judge(&changed).is_err(), "byte {at} of the proof");
        }
        let mut endless = Greeting::default();
        let mut records = Vec::new();
        for _ in 0..100 {
            records.extend_from_slice(&[FIRST_BYTE, 3, 1, 0, 4, 1, 0, 0x40, 0]);
        }
        let ended = records.chunks(9).map(|r| endless.read(&r.repeat(9), &server)).find_map(Result::err);
        assert!(ended.is_some());
    }

    #[test]
    fn a_node_takes_no_other_key() {
        // The same proof, and a key of another psk: whoever holds it has not this relay's.
        let mut server = Server::new(&RELAY, &psks()).unwrap();
        let (first, second) = (Arc::clone(&server.0[0].1), Arc::clone(&server.0[1].1));
        (server.0[0].1, server.0[1].1) = (second, first);
        let mut node = client(&RELAY, &Key([1; 32]), "192.0.2.1", [9; NONCE]).unwrap();
        let mut bytes = Vec::new();
        node.write_tls(&mut bytes).unwrap();
        let mut relay = Greeting::default().read(&bytes, &server).unwrap().unwrap();
        bytes.clear();
        while relay.wants_write() {
            relay.write_tls(&mut bytes).unwrap();
        }
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            node.read_tls(&mut rest).unwrap();
        }
        assert!(node.process_new_packets().unwrap_err().to_string().contains("not the relay's key"));
    }
}
