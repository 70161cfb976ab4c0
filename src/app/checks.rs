//! What the agent makes of its config and bundle before it starts.

use crate::{
    config::Config,
    tunnel::identity::{Bundle, NAME_RULE, Roles, node_name, utc},
};
use anyhow::ensure;

/// A certificate that ends sooner is warned of.
const RENEW_SECS: u64 = 30 * 86_400;

/// The node's name: the bundle's, else the config's, else the host's.
///
/// # Errors
/// When two of them are at odds, or the host's is no node's name.
pub(crate) fn name(config: &Config, bundle: Option<&Bundle>, host: &str) -> anyhow::Result<String> {
    let wanted = &config.node.name;
    if let Some(bundle) = bundle {
        let issued = &bundle.certificate.name;
        ensure!(wanted.is_empty() || wanted == issued, "node.name is {wanted}, and the bundle is {issued}'s");
        return Ok(issued.clone());
    }
    if !wanted.is_empty() {
        return Ok(wanted.clone());
    }
    let host = host.trim().to_ascii_lowercase();
    ensure!(node_name(&host).is_some(), "the host's name {host:?} cannot be the node's ({NAME_RULE}): set node.name");
    Ok(host)
}

/// The node's network: the config's, else the bundle's.
pub(crate) fn network<'a>(config: &'a Config, bundle: Option<&'a Bundle>) -> &'a str {
    let of_bundle = bundle.map_or("", |b| b.certificate.network.as_str());
    if config.node.network.is_empty() { of_bundle } else { &config.node.network }
}

/// # Errors
/// When there is to be a relay and cannot be.
pub(crate) fn relay(config: &Config, bundle: Option<&Bundle>) -> anyhow::Result<()> {
    if config.relay.enable {
        ensure!(config.tunnel.enable, "relay.enable: a relay needs the tunnel, and tunnel.enable is false");
        ensure!(bundle.is_some(), "relay.enable: a relay needs a bundle (--bundle, or node.bundle)");
    }
    Ok(())
}

/// What is no error and should not stay so.
pub(crate) fn warnings(config: &Config, bundle: Option<&Bundle>, now: u64) -> Vec<String> {
    let mut out = Vec::new();
    let Some(bundle) = bundle else {
        if config.tunnel.enable {
            out.push("there is no bundle, and so no tunnel: other nodes' endpoints cannot be reached".into());
        }
        return out;
    };
    let c = &bundle.certificate;
    if let Err(why) = c.verify(&bundle.ca, now) {
        out.push(format!("{why}: other nodes refuse us; `weft ca issue --node {}` makes a new one", c.name));
    } else if c.not_after - now < RENEW_SECS {
        out.push(format!("the certificate ends on {}", utc(c.not_after)));
    }
    if config.relay.enable && !c.roles.contains(Roles::RELAY) {
        out.push("relay.enable is true and the certificate has not the role relay: nodes will not use us".into());
    }
    for relay in &bundle.relays {
        if let Err(why) = relay.certificate.verify(&bundle.ca, now) {
            out.push(format!("relay {}: {why}", relay.at.name));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tunnel::identity::{Authority, Psk, Request, Secret};
    use ring::rand::SystemRandom;

    const NOW: u64 = 1_795_000_000;

    fn bundle(roles: Roles, not_after: u64) -> Bundle {
        let rng = SystemRandom::new();
        let ca = Authority::generate(&rng).unwrap();
        let request = Request { name: "edge-1".into(), key: [1; 32], roles, network: "cloud".into(), not_after };
        let psks = vec![Psk { epoch: 1, key: Secret::random(&rng).unwrap() }];
        Bundle { certificate: ca.issue(request).unwrap(), key: None, ca: ca.public(), psks, relays: Vec::new() }
    }

    fn config(text: &str) -> Config {
        Config::parse(text).unwrap()
    }

    #[test]
    fn names() {
        let b = bundle(Roles::NONE, NOW);
        let said = |text: &str, b: Option<&Bundle>, host: &str| name(&config(text), b, host).map_err(|e| e.to_string());
        assert_eq!(said("", Some(&b), "host"), Ok("edge-1".into()));
        assert_eq!(said("node.name = \"edge-1\"", Some(&b), "host"), Ok("edge-1".into()));
        assert_eq!(
            said("node.name = \"edge-2\"", Some(&b), "host"),
            Err("node.name is edge-2, and the bundle is edge-1's".into())
        );
        assert_eq!(said("node.name = \"edge-2\"", None, "host"), Ok("edge-2".into()));
        assert_eq!(said("", None, "OpenWrt\n"), Ok("openwrt".into()));
        assert!(said("", None, "my router").unwrap_err().contains("set node.name"));
        assert_eq!(network(&config(""), Some(&b)), "cloud");
        assert_eq!(network(&config("node.network = \"home\""), Some(&b)), "home");
        assert_eq!(network(&config(""), None), "");
    }

    #[test]
    fn a_relay_needs_a_tunnel_and_a_bundle() {
        let b = bundle(Roles::RELAY, NOW);
        assert!(relay(&config(""), None).is_ok());
        assert!(relay(&config("relay.enable = true"), Some(&b)).is_ok());
        assert!(relay(&config("relay.enable = true"), None).is_err());
        assert!(relay(&config("relay.enable = true\ntunnel.enable = false"), Some(&b)).is_err());
    }

    #[test]
    fn certificates_that_end_are_warned_of() {
        let said = |text: &str, b: &Bundle| warnings(&config(text), Some(b), NOW).join("; ");
        assert_eq!(said("", &bundle(Roles::NONE, NOW + RENEW_SECS)), "");
        assert_eq!(said("", &bundle(Roles::NONE, NOW + 60)), "the certificate ends on 2026-11-18 11:07 UTC");
        assert!(said("", &bundle(Roles::NONE, NOW - 1)).starts_with("the certificate expired on 2026-11-18 11:06 UTC"));
        assert!(said("relay.enable = true", &bundle(Roles::NONE, NOW * 2)).contains("has not the role relay"));
        assert_eq!(warnings(&config("tunnel.enable = false"), None, NOW), Vec::<String>::new());
        assert_eq!(warnings(&config(""), None, NOW).len(), 1);
    }
}
