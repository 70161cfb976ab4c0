//! `weft ca show`: bundles and the CA without their secrets.

use crate::encoding::BASE64;
use crate::{
    admin::render,
    tunnel::identity::{self, CaPublic, utc},
};
use nanoserde::SerJson;

/// A bundle, as text or JSON.
pub(super) fn bundle(b: &identity::Bundle, now: u64, json: bool) -> String {
    let shown = Bundle::new(b, now);
    if json { shown.serialize_json() } else { shown.text() }
}

/// A CA with all that it issued, as text or JSON.
pub(super) fn authority(
    ca: &CaPublic,
    psk_epochs: Vec<u8>,
    issued: &[identity::Certificate],
    now: u64,
    json: bool,
) -> String {
    let shown = Authority::new(ca, psk_epochs, issued, now);
    if json { shown.serialize_json() } else { shown.text() }
}

#[derive(SerJson)]
struct Certificate {
    name: String,
    roles: Vec<String>,
    network: String,
    public_key: String,
    not_after: u64,
    not_after_text: String,
    /// good or expired; its signature was checked when it was read.
    state: String,
}

#[derive(SerJson)]
struct Relay {
    name: String,
    address: String,
    certificate: Certificate,
}

#[derive(SerJson)]
struct Bundle {
    certificate: Certificate,
    has_private_key: bool,
    ca: String,
    psk_epochs: Vec<u8>,
    relays: Vec<Relay>,
}

#[derive(SerJson)]
struct Authority {
    ca: String,
    psk_epochs: Vec<u8>,
    issued: Vec<Certificate>,
}

impl Certificate {
    fn new(c: &identity::Certificate, now: u64) -> Self {
        Self {
            name: c.name.clone(),
            roles: c.roles.names().map(Into::into).collect(),
            network: c.network.clone(),
            public_key: BASE64.encode(&c.key),
            not_after: c.not_after,
            not_after_text: utc(c.not_after),
            state: if now > c.not_after { "expired" } else { "good" }.into(),
        }
    }
}

impl Bundle {
    fn new(b: &identity::Bundle, now: u64) -> Self {
        let relay = |r: &identity::BundleRelay| Relay {
            name: r.at.name.clone(),
            address: r.at.address(),
            certificate: Certificate::new(&r.certificate, now),
        };
        Self {
            certificate: Certificate::new(&b.certificate, now),
            has_private_key: b.key.is_some(),
            ca: BASE64.encode(&b.ca.0),
            psk_epochs: b.psks.iter().map(|p| p.epoch).collect(),
            relays: b.relays.iter().map(relay).collect(),
        }
    }

    fn text(&self) -> String {
        let c = &self.certificate;
        let roles = if c.roles.is_empty() { "none".into() } else { c.roles.join(", ") };
        let network = if c.network.is_empty() { "none" } else { &c.network };
        let key = if self.has_private_key { "" } else { " (the private key is elsewhere)" };
        let mut text = format!(
            "node        {}\nroles       {roles}\nnetwork     {network}\nnot after   {} ({})\nkey         {}{key}\n\
             ca          {}\npsk epochs  {:?}",
            c.name, c.not_after_text, c.state, c.public_key, self.ca, self.psk_epochs
        );
        for r in &self.relays {
            text += &format!("\nrelay       {}@{} until {}", r.name, r.address, r.certificate.not_after_text);
        }
        text
    }
}

impl Authority {
    fn new(ca: &CaPublic, psk_epochs: Vec<u8>, issued: &[identity::Certificate], now: u64) -> Self {
        let issued = issued.iter().map(|c| Certificate::new(c, now)).collect();
        Self { ca: BASE64.encode(&ca.0), psk_epochs, issued }
    }

    fn text(&self) -> String {
        let row = |c: &Certificate| {
            [c.name.clone(), c.roles.join(","), c.network.clone(), c.not_after_text.clone(), c.state.clone()]
        };
        let issued = render::table(["NODE", "ROLES", "NETWORK", "NOT AFTER", "STATE"], self.issued.iter().map(row));
        format!("ca          {}\npsk epochs  {:?}\n\n{}", self.ca, self.psk_epochs, issued.trim_end())
    }
}
