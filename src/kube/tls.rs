//! TLS 1.3 to an API server: PEM -> the settings of a connection, and its errors in words that name the remedy. Go's
//! servers speak it since 2019; version 1.2 stays out, for the size of the executable.

use crate::clock::Clock;
use rustls::{
    CertificateError, ClientConfig, ClientConnection, Error, RootCertStore,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject as _},
    time_provider::TimeProvider,
    version::TLS13,
};
use std::{sync::Arc, time::Duration};

/// The only protocol that we speak above it.
const ALPN: &[u8] = b"http/1.1";

/// Routers boot in 1970: certificates are held against the latest time that is known to have passed.
#[derive(Debug)]
struct Known(Clock);

impl TimeProvider for Known {
    fn current_time(&self) -> Option<UnixTime> {
        Some(UnixTime::since_unix_epoch(Duration::from_secs(self.0.unix())))
    }
}

const UNFIT: &str = "the client's certificate and key cannot be used: do they belong together?";

/// What a connection is made from.
#[derive(Clone, Copy, Debug)]
pub struct Material<'m> {
    pub ca: &'m [u8],
    /// Certificate and key.
    pub client: Option<(&'m [u8], &'m [u8])>,
}

/// A connection that has not begun yet.
///
/// # Errors
/// What cannot be used of the material, in words.
pub fn connection(material: Material<'_>, name: &str, clock: Clock) -> Result<ClientConnection, String> {
    let name = ServerName::try_from(name.to_owned()).map_err(|_| format!("{name:?} cannot be in a certificate"))?;
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(material.ca) {
        let certificate = certificate.map_err(|e| format!("the CA's file: {e}"))?;
        // A bundle of a system may hold some that nobody can use.
        let _ = roots.add(certificate);
    }
    if roots.is_empty() {
        return Err("the CA's file holds no certificate that can be used".into());
    }
    let provider = Arc::new(ring::default_provider());
    let versions = ClientConfig::builder_with_details(provider, Arc::new(Known(clock)))
        .with_protocol_versions(&[&TLS13])
        .map_err(|e| words(&e))?
        .with_root_certificates(roots);
    let mut config = match material.client {
        None => versions.with_no_client_auth(),
        Some((certificate, key)) => {
            let chain = CertificateDer::pem_slice_iter(certificate)
                .collect::<Result<Vec<_>, _>>()
                .map_err(|e| format!("the client's certificate: {e}"))?;
            let key = PrivateKeyDer::from_pem_slice(key).map_err(|e| format!("the client's key: {e}"))?;
            versions.with_client_auth_cert(chain, key).map_err(|_| UNFIT.to_owned())?
        }
    };
    config.alpn_protocols = vec![ALPN.to_vec()];
    // A connection lives for hours; what would resume it costs memory.
    config.resumption = rustls::client::Resumption::disabled();
    ClientConnection::new(Arc::new(config), name).map_err(|e| words(&e))
}

/// Whether a clock that is put right would mend it.
#[must_use]
pub fn is_about_time(error: &Error) -> bool {
    use CertificateError::{Expired, ExpiredContext, NotValidYet, NotValidYetContext};
    matches!(
        error,
        Error::InvalidCertificate(Expired | ExpiredContext { .. } | NotValidYet | NotValidYetContext { .. })
    )
}

/// In words that name the remedy.
#[must_use]
pub fn words(error: &Error) -> String {
    use CertificateError::{
        Expired, ExpiredContext, NotValidForName, NotValidForNameContext, NotValidYet, NotValidYetContext,
        UnknownIssuer,
    };
    match error {
        Error::InvalidCertificate(NotValidYet | NotValidYetContext { .. }) => {
            "the server's certificate is not valid yet: is this machine's clock right?".into()
        }
        Error::InvalidCertificate(Expired | ExpiredContext { .. }) => {
            "the server's certificate has expired: renew it, or is this machine's clock wrong?".into()
        }
        Error::InvalidCertificate(UnknownIssuer) => {
            "the server's certificate is of another CA than the one that is configured (kube.ca_file)".into()
        }
        Error::InvalidCertificate(NotValidForName | NotValidForNameContext { .. }) => {
            "the server's certificate is not for this address: use one that is in it".into()
        }
        // The names of all alerts and errors would cost some kilobytes.
        Error::AlertReceived(alert) => {
            let code = u8::from(*alert);
            format!("the server refuses TLS (alert {code} of RFC 8446); is the client's certificate right?")
        }
        Error::InvalidMessage(_) => "it does not speak TLS: is it http:// there, or another server?".into(),
        Error::PeerIncompatible(_) => "it does not speak TLS 1.3".into(),
        Error::InvalidCertificate(_) => "the server's certificate cannot be used".into(),
        Error::DecryptError | Error::PeerMisbehaved(_) | Error::InappropriateMessage { .. } => {
            "what comes is not what a TLS server says".into()
        }
        _ => "TLS fails".into(),
    }
}
