//! The one file that makes a machine a node: certificate, key, CA, psk and the relays.

use super::{CaPublic, Certificate, KeyPair, Psk, Roles, Secret, node_name, utc};
use crate::config::{
    RelayName,
    read::{self, Mistake, tables},
};
use crate::encoding::BASE64;
use anyhow::{Context, bail, ensure};
use std::fmt::Write;
use zeroize::{Zeroize, Zeroizing};

/// The current psk and the previous one.
pub const EPOCHS_MAX: usize = 2;
/// A node publishes itself at every relay of the list; more than these are refused.
pub const RELAYS_MAX: usize = 8;
const FORMAT: u8 = 1;

/// See the module.
#[derive(Clone, Debug, PartialEq)]
pub struct Bundle {
    pub certificate: Certificate,
    /// The private half of the certificate's key; None: the node keeps it elsewhere.
    pub key: Option<Secret<[u8; 32]>>,
    pub ca: CaPublic,
    /// 1..=[`EPOCHS_MAX`], the current one first.
    pub psks: Vec<Psk>,
    pub relays: Vec<BundleRelay>,
}

/// A relay, and how it proves that it is one.
#[derive(Clone, Debug, PartialEq)]
pub struct BundleRelay {
    pub at: RelayName,
    pub certificate: Certificate,
}

tables! {
    struct RawBundle {
        version: u8,
        certificate: String,
        private_key: Option<String>,
        ca: String,
        psk: Vec<RawPsk>,
        relays: Vec<RawRelay>,
    }

    struct RawPsk {
        epoch: u8,
        key: String,
    }

    struct RawRelay {
        name: String,
        address: String,
        certificate: String,
    }
}

impl Bundle {
    /// Reads a bundle and checks all that needs no clock: signatures, that the key fits, names, bounds.
    ///
    /// # Errors
    /// A text for the user, without any secret in it.
    pub fn parse(text: &str) -> anyhow::Result<Self> {
        let mut raw: RawBundle = read::document(text).map_err(|e| without_input(text, &e))?;
        ensure!(raw.version == FORMAT, "version = {}: this weft reads bundles of version {FORMAT}", raw.version);
        let ca = CaPublic(public(&raw.ca).context("ca")?);
        let certificate = certificate(&raw.certificate).context("certificate")?;
        certificate.verify_signature(&ca).context("certificate, against the bundle's ca")?;

        let key = match &mut raw.private_key {
            None => None,
            Some(text) => Some(secret(text).context("private_key")?),
        };
        if let Some(key) = &key {
            ensure!(
                KeyPair::from_private(key.clone())?.public == certificate.key,
                "private_key: it is not the key of the certificate ({})",
                certificate.name
            );
        }

        let mut psks: Vec<Psk> = Vec::new();
        for raw in &mut raw.psk {
            let key = secret(&mut raw.key).with_context(|| format!("psk of epoch {}", raw.epoch))?;
            ensure!(psks.iter().all(|p| p.epoch != raw.epoch), "psk: epoch {} is there twice", raw.epoch);
            psks.push(Psk { epoch: raw.epoch, key });
        }
        ensure!(!psks.is_empty(), "psk: there is none");
        ensure!(psks.len() <= EPOCHS_MAX, "psk: {} of them; at most {EPOCHS_MAX} are kept", psks.len());

        ensure!(raw.relays.len() <= RELAYS_MAX, "relays: {} of them; at most {RELAYS_MAX}", raw.relays.len());
        let relays = raw
            .relays
            .iter()
            .map(|r| BundleRelay::read(r, &ca).with_context(|| format!("relay {:?}", r.name)))
            .collect::<anyhow::Result<_>>()?;
        Ok(Self { certificate, key, ca, psks, relays })
    }

    /// The file's text; [`Bundle::parse`] reads it back.
    #[must_use]
    pub fn render(&self) -> Zeroizing<String> {
        let c = &self.certificate;
        // Room for all of it: a String that grows leaves copies of its secrets behind.
        let mut out = Zeroizing::new(String::with_capacity(2_048 + self.relays.len() * 1_024));
        let secret = if self.key.is_some() { "the node's private key and " } else { "" };
        let ca = BASE64.encode(&self.ca.0);
        let cert = BASE64.encode(&c.encode());
        let _ = write!(
            out,
            "# weft bundle of {}\n# roles: {}, network: {}, good until {}\n\
             # Secret: it holds {secret}the cluster's psk. Keep it 0600.\n\n\
             version = {FORMAT}\ncertificate = \"{cert}\"\n",
            c.name,
            c.roles,
            if c.network.is_empty() { "none" } else { &c.network },
            utc(c.not_after),
        );
        let _ = match &self.key {
            Some(key) => writeln!(out, "private_key = \"{}\"", *key.to_base64()),
            None => writeln!(out, "#private_key = \"the node's own, 32 bytes in base64: fill in on the node\""),
        };
        let _ = writeln!(out, "ca = \"{ca}\"");
        for psk in &self.psks {
            let _ = write!(out, "\n[[psk]]\nepoch = {}\nkey = \"{}\"\n", psk.epoch, *psk.key.to_base64());
        }
        for BundleRelay { at, certificate } in &self.relays {
            let cert = BASE64.encode(&certificate.encode());
            let address = at.address();
            let _ = write!(
                out,
                "\n[[relays]]\nname = \"{}\"\naddress = \"{address}\"\ncertificate = \"{cert}\"\n",
                at.name
            );
        }
        out
    }
}

impl BundleRelay {
    fn read(raw: &RawRelay, ca: &CaPublic) -> anyhow::Result<Self> {
        let at: RelayName =
            format!("{}@{}", raw.name, raw.address).parse().map_err(|e| anyhow::anyhow!("address: {e}"))?;
        let certificate = certificate(&raw.certificate).context("certificate")?;
        certificate.verify_signature(ca).context("certificate, against the bundle's ca")?;
        ensure!(
            node_name(&at.name).is_some() && certificate.name == at.name,
            "certificate: it is {}'s",
            certificate.name
        );
        ensure!(certificate.roles.contains(Roles::RELAY), "certificate: it has not the role relay");
        Ok(Self { at, certificate })
    }
}

/// Without the line itself, which may be a secret.
fn without_input(text: &str, mistake: &Mistake) -> anyhow::Error {
    let at = mistake.span.start.min(text.len());
    let line = 1 + text.as_bytes()[..at].iter().filter(|b| **b == b'\n').count();
    anyhow::anyhow!("line {line}: {}", mistake.what)
}

fn certificate(text: &str) -> anyhow::Result<Certificate> {
    let Ok(bytes) = BASE64.decode(text.trim().as_bytes()) else { bail!("not base64") };
    Ok(Certificate::decode(&bytes)?)
}

fn public(text: &str) -> anyhow::Result<[u8; 32]> {
    let bytes = BASE64.decode(text.trim().as_bytes()).ok().and_then(|b| b.try_into().ok());
    bytes.context("expected 32 bytes in base64")
}

fn secret(text: &mut String) -> anyhow::Result<Secret<[u8; 32]>> {
    let secret = Secret::from_base64(text);
    text.zeroize();
    secret.context("expected 32 bytes in base64")
}
