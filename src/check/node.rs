//! This machine: its clock, disk, name and secret, and the cluster's parts beside us.

use super::line::{Line, fail, ok, warn};
use crate::{
    clock::BUILT,
    disk::Medium,
    tunnel::identity::{Bundle, KeyPair, utc},
};

/// A certificate that ends sooner is warned of.
const RENEW_SECS: u64 = 30 * 86_400;
/// A clock that is further ahead of the day this was built is wrong.
const AHEAD_SECS: u64 = 20 * 365 * 86_400;
/// Bytes of the disk below which there is trouble soon, and now: the snapshot of 5,000 Services has 2 MB.
const FREE_WARN: u64 = 4 << 20;
const FREE_FAIL: u64 = 64 << 10;
const KUBEEDGE: &str = "/etc/kubeedge/config/edgecore.yaml";

/// `now`: as the clock has it, in seconds.
#[must_use]
pub fn clock(now: u64) -> Line {
    if now < BUILT {
        return warn(
            "clock",
            &["it says ", &utc(now), ", which is before weft was built"],
            &["set it (NTP); until then certificates are held against the newest time that is known"],
        );
    }
    if now > BUILT + AHEAD_SECS {
        return fail("clock", &["it says ", &utc(now), ", which cannot be"], &["set it (NTP)"]);
    }
    ok("clock", &["it says ", &utc(now)])
}

/// The secret, and whether it is good at `now`.
#[must_use]
pub fn bundle(bundle: Option<Result<&Bundle, String>>, is_private: bool, wants_tunnel: bool, now: u64) -> Line {
    let b = match bundle {
        None if !wants_tunnel => return ok("bundle", &["none, and the tunnel is off"]),
        None => {
            return warn(
                "bundle",
                &["none: other nodes' endpoints cannot be reached"],
                &["`weft ca issue --node NAME` makes one; give it as --bundle or node.bundle"],
            );
        }
        Some(Err(why)) => return fail("bundle", &[&why], &["fetch it again from where `weft ca issue` wrote it"]),
        Some(Ok(bundle)) => bundle,
    };
    let (c, again) = (&b.certificate, ["`weft ca issue --node ", &b.certificate.name, "` makes a new one"]);
    if let Err(why) = c.verify(&b.ca, now) {
        return fail("bundle", &[&why.to_string(), "; it is ", &utc(now)], &again);
    }
    let pair = b.key.clone().map(KeyPair::from_private);
    match pair {
        None => return fail("bundle", &["its line private_key is empty"], &["fill it in, or issue it with a key"]),
        Some(Err(_)) => return fail("bundle", &["its key is none"], &again),
        Some(Ok(pair)) if pair.public != c.key => {
            return fail("bundle", &["the certificate is not for its key"], &again);
        }
        Some(Ok(_)) => {}
    }
    if !is_private {
        return warn("bundle", &["it is a secret, and others may read it"], &["chmod 600 it"]);
    }
    if c.not_after < now + RENEW_SECS {
        return warn("bundle", &["the certificate ends on ", &utc(c.not_after)], &again);
    }
    ok("bundle", &["of ", &c.name, ", good until ", &utc(c.not_after)])
}

/// `name`: what the agent would call itself, or why it cannot; `edgecore`, `host`: what the cluster calls this machine.
#[must_use]
pub fn name(name: Result<&str, String>, edgecore: Option<&str>, in_api: Option<u16>) -> Line {
    let name = match name {
        Ok(name) => name,
        Err(why) => return fail("name", &[&why], &["set node.name to what `kubectl get nodes` shows"]),
    };
    if let Some(other) = edgecore.filter(|other| *other != name) {
        return fail(
            "name",
            &["we are ", name, ", and edgecore calls this node ", other],
            &["issue the bundle for ", other, ", or correct hostnameOverride in ", KUBEEDGE],
        );
    }
    match in_api {
        Some(404) => fail(
            "name",
            &["Kubernetes has no node ", name],
            &["issue the bundle, or set node.name, for a name that `kubectl get nodes` shows"],
        ),
        Some(200) => ok("name", &[name, ", as Kubernetes has it"]),
        Some(_) | None => ok("name", &[name]),
    }
}

/// `written`: whether a file could be made in the directory; `free`: its bytes.
#[must_use]
pub fn disk(directory: &str, written: Result<(), String>, medium: Medium, free: u64) -> Line {
    let megabytes = (free >> 20).to_string();
    if let Err(why) = written {
        return fail("disk", &[directory, " cannot be written: ", &why], &["set node.state_dir to one that can"]);
    }
    if free < FREE_WARN {
        let (text, remedy) = ([directory, " has ", &megabytes, " MB left"], ["make room, or set node.state_dir"]);
        return if free < FREE_FAIL { fail("disk", &text, &remedy) } else { warn("disk", &text, &remedy) };
    }
    match medium {
        Medium::Memory => warn(
            "disk",
            &[directory, " is in memory: after a reboot nothing is known offline"],
            &["set node.state_dir to a directory on a disk, such as /etc/weft/state"],
        ),
        Medium::Flash => {
            ok("disk", &[directory, " is on flash: written at most once an hour, ", &megabytes, " MB free"])
        }
        Medium::Disk => ok("disk", &[directory, ", ", &megabytes, " MB free"]),
    }
}

/// What is asked of the metaServer, or the API, on this machine: the status of each answer, or why there is none.
#[derive(Debug, Default)]
pub struct Asked {
    pub at: String,
    pub services: Option<Result<u16, String>>,
    pub slices: Option<Result<u16, String>>,
    pub node: Option<u16>,
}

/// `yaml`: edgecore's.
#[must_use]
pub fn meta_server(yaml: &str, asked: &Asked) -> Line {
    const SWITCH: &str = "modules.metaManager.metaServer.enable: true";
    if value(yaml, &["modules", "metaManager", "metaServer", "enable"]) != ["true"] {
        return fail(
            "metaserver",
            &["edgecore's metaServer is switched off: there is no API on this node"],
            &[SWITCH, " in ", KUBEEDGE, ", and restart edgecore"],
        );
    }
    match (&asked.services, &asked.slices) {
        (Some(Err(why)), _) => fail(
            "metaserver",
            &[&asked.at, " does not answer: ", why],
            &["is edgecore running? see `journalctl -u edgecore`"],
        ),
        (Some(Ok(200)), Some(Ok(200))) => ok("metaserver", &["it answers at ", &asked.at]),
        (Some(Ok(200)), Some(other)) => {
            let why = other.as_ref().map_or_else(Clone::clone, ToString::to_string);
            fail(
                "metaserver",
                &["it knows no EndpointSlices (", &why, "): the cloud's dynamicController is off"],
                &["modules.dynamicController.enable: true in cloudcore.yaml, and restart cloudcore"],
            )
        }
        (Some(Ok(status)), _) => {
            let status = status.to_string();
            let remedy = if *asked.services.as_ref().map_or(&0, |s| s.as_ref().unwrap_or(&0)) == 401 {
                "switch requireAuthorization off, or give weft a token (kube.token_file)"
            } else {
                "modules.dynamicController.enable: true in cloudcore.yaml, and restart cloudcore"
            };
            fail("metaserver", &["it answers with status ", &status], &[remedy])
        }
        (None, _) => ok("metaserver", &["it is switched on"]),
    }
}

/// The API server of the configuration.
#[must_use]
pub fn api(asked: &Asked) -> Line {
    let at = &asked.at;
    let mut answers = [("services", &asked.services), ("endpointslices", &asked.slices)].into_iter();
    let Some((what, Some(other))) = answers.find(|(_, answer)| !matches!(answer, None | Some(Ok(200)))) else {
        return ok("api", &[at, " lets us list services and endpointslices"]);
    };
    let status = match other {
        Err(why) => {
            return fail(
                "api",
                &[at, ": ", why],
                &["mend that, or [kube] in weft.toml; what is saved serves until then"],
            );
        }
        Ok(status) => status.to_string(),
    };
    let (text, remedy) = match other {
        Ok(401) => (
            ": the token or certificate is not accepted",
            "is it of this cluster, and not expired? see kube.token_file and kube.kubeconfig",
        ),
        Ok(403) => (": it does not let us list them", "bind the ClusterRole of packaging/kubernetes/rbac.yaml"),
        // The agent takes Endpoints there.
        Ok(404) if what == "endpointslices" => return ok("api", &[at, " answers, and has no endpointslices"]),
        Ok(_) | Err(_) => ("", "is that an API server, and is it well?"),
    };
    fail("api", &[at, " answers ", &status, " for ", what, text], &[remedy])
}

/// `edgecore`, `kubelet`: their configurations, where they are; `take_over`: whether a Service's address is answered.
#[must_use]
pub fn cluster_dns(edgecore: Option<&str>, kubelet: Option<&str>, ours: &str, take_over: bool) -> Option<Line> {
    if let Some(yaml) = edgecore {
        let new = value(yaml, &["modules", "edged", "tailoredKubeletConfig", "clusterDNS"]);
        let old = value(yaml, &["modules", "edged", "clusterDNS"]);
        let said = if new.is_empty() { old } else { new };
        return Some(if said.iter().any(|s| s == ours) {
            ok("cluster-dns", &["edgecore gives pods ", ours])
        } else {
            let said = if said.is_empty() { "none".to_owned() } else { said.join(", ") };
            warn(
                "cluster-dns",
                &["edgecore gives pods as their DNS: ", &said],
                &[
                    "modules.edged.tailoredKubeletConfig.clusterDNS: [",
                    ours,
                    "] in ",
                    KUBEEDGE,
                    ", and restart edgecore",
                ],
            )
        });
    }
    let said = value(kubelet?, &["clusterDNS"]);
    Some(if said.iter().any(|s| s == ours) || take_over {
        ok("cluster-dns", &["the kubelet's pods ask weft"])
    } else {
        warn(
            "cluster-dns",
            &["the kubelet gives pods as their DNS: ", &said.join(", ")],
            &["dns.take_over = \"kube-system/kube-dns\" answers there while the cluster's own is out of reach"],
        )
    })
}

/// The value, or the list, at a path of keys in YAML of blocks, as Kubernetes' components are configured with. Empty:
/// there is none.
#[must_use]
pub fn value(yaml: &str, path: &[&str]) -> Vec<String> {
    let plain = |text: &str| text.trim().trim_matches(['"', '\'']).to_owned();
    let mut keys: Vec<(usize, &str)> = Vec::new();
    let mut out = Vec::new();
    for line in yaml.lines() {
        let line = line.split(" #").next().unwrap_or_default().trim_end();
        let text = line.trim_start();
        let indent = line.len() - text.len();
        if text.is_empty() || text.starts_with('#') {
            continue;
        }
        if let Some(item) = text.strip_prefix("- ") {
            // A list may stand as far left as its key.
            keys.retain(|(at, _)| *at <= indent);
            if keys.iter().map(|(_, key)| *key).eq(path.iter().copied()) {
                out.push(plain(item));
            }
            continue;
        }
        let Some((key, rest)) = text.split_once(':') else { continue };
        keys.retain(|(at, _)| *at < indent);
        keys.push((indent, key.trim_matches(['"', '\''])));
        if keys.iter().map(|(_, key)| *key).eq(path.iter().copied()) {
            let rest = rest.trim();
            let items = rest.strip_prefix('[').and_then(|r| r.strip_suffix(']'));
            out = items.unwrap_or(rest).split(',').map(plain).filter(|s| !s.is_empty()).collect();
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tunnel::identity::{Authority, Psk, Request, Roles, Secret};
    use ring::rand::SystemRandom;

    const NOW: u64 = BUILT + 1_000_000;

    fn verdict(line: &Line) -> &str {
        &line.verdict
    }

    #[test]
    fn clocks() {
        for (now, expected) in [(60, "warn"), (BUILT - 1, "warn"), (BUILT, "ok"), (NOW, "ok"), (BUILT * 2, "fail")] {
            assert_eq!(verdict(&clock(now)), expected, "{now}");
        }
    }

    #[test]
    fn secrets() {
        let rng = SystemRandom::new();
        let ca = Authority::generate(&rng).unwrap();
        let make = |not_after, own: bool| {
            let key = Secret::random(&rng).unwrap();
            let pair = KeyPair::from_private(key.clone()).unwrap();
            let public = if own { pair.public } else { [9; 32] };
            let request =
                Request { name: "edge-1".into(), key: public, roles: Roles::NONE, network: String::new(), not_after };
            let psks = vec![Psk { epoch: 1, key: Secret::random(&rng).unwrap() }];
            let certificate = ca.issue(request).unwrap();
            Bundle { certificate, key: Some(key), ca: ca.public(), psks, relays: Vec::new() }
        };
        let good = make(NOW + 2 * RENEW_SECS, true);
        let said = |b: &Bundle, private, now| {
            let line = bundle(Some(Ok(b)), private, true, now);
            [line.verdict, line.text].join(" ")
        };
        assert!(said(&good, true, NOW).starts_with("ok of edge-1"));
        assert!(said(&good, false, NOW).contains("others may read it"));
        assert!(said(&make(NOW + 60, true), true, NOW).starts_with("warn the certificate ends on"));
        assert!(said(&good, true, NOW * 2).starts_with("fail"));
        assert!(said(&make(NOW * 2, false), true, NOW).contains("not for its key"));
        let keyless = Bundle { key: None, ..good };
        assert!(said(&keyless, true, NOW).contains("private_key"));
        assert_eq!(verdict(&bundle(None, true, true, NOW)), "warn");
        assert_eq!(verdict(&bundle(None, true, false, NOW)), "ok");
        assert_eq!(verdict(&bundle(Some(Err("x".into())), true, true, NOW)), "fail");
    }

    #[test]
    fn names() {
        assert_eq!(verdict(&name(Ok("a"), None, None)), "ok");
        assert_eq!(verdict(&name(Ok("a"), Some("a"), Some(200))), "ok");
        let line = name(Ok("a"), Some("b"), None);
        assert_eq!((verdict(&line), line.remedy.contains("for b")), ("fail", true));
        assert!(name(Ok("a"), None, Some(404)).text.contains("has no node a"));
        assert_eq!(verdict(&name(Err("x".into()), None, None)), "fail");
    }

    #[test]
    fn disks() {
        let (many, few) = (1 << 30, 1 << 20);
        for (written, medium, free, expected) in [
            (Ok(()), Medium::Disk, many, "ok"),
            (Ok(()), Medium::Flash, many, "ok"),
            (Ok(()), Medium::Memory, many, "warn"),
            (Ok(()), Medium::Disk, few, "warn"),
            (Ok(()), Medium::Disk, 100, "fail"),
            (Err("read-only file system".to_owned()), Medium::Disk, many, "fail"),
        ] {
            assert_eq!(verdict(&disk("/x", written.clone(), medium, free)), expected, "{written:?} {medium:?} {free}");
        }
    }

    const EDGECORE: &str = "apiVersion: v1\nmodules:\n  edged:\n    hostnameOverride: edge-1\n    tailoredKubeletConfig:\n      \
                            clusterDNS:\n      - 169.254.96.16   # ours\n      clusterDomain: cluster.local\n  metaManager:\n    \
                            metaServer:\n      enable: true\n      server: \"127.0.0.1:10550\"\n";

    #[test]
    fn values_of_yaml() {
        assert_eq!(value(EDGECORE, &["modules", "edged", "hostnameOverride"]), ["edge-1"]);
        assert_eq!(value(EDGECORE, &["modules", "edged", "tailoredKubeletConfig", "clusterDNS"]), ["169.254.96.16"]);
        assert_eq!(value(EDGECORE, &["modules", "metaManager", "metaServer", "server"]), ["127.0.0.1:10550"]);
        assert_eq!(value("clusterDNS: [ \"a\", 'b' ]\n", &["clusterDNS"]), ["a", "b"]);
        assert_eq!(value("x:\n  clusterDNS: a\n", &["clusterDNS"]), Vec::<String>::new());
        assert_eq!(value("clusterDNS:\n  - a\n  - b\nother:\n  - c\n", &["clusterDNS"]), ["a", "b"]);
        assert_eq!(value("nonsense\n: :\n- \n", &["x"]), Vec::<String>::new());
    }

    #[test]
    fn both_switches_of_the_meta_server() {
        let asked = |services, slices| Asked { at: "127.0.0.1:10550".into(), services, slices, node: None };
        let ok200 = || Some(Ok(200));
        let said = |yaml: &str, asked: &Asked| {
            let line = meta_server(yaml, asked);
            [line.verdict, line.remedy].join(" ")
        };
        assert_eq!(said(EDGECORE, &asked(ok200(), ok200())), "ok ");
        assert!(said("", &asked(None, None)).starts_with("fail modules.metaManager.metaServer.enable: true"));
        assert!(said(EDGECORE, &asked(Some(Err("refused".into())), None)).contains("is edgecore running"));
        for slices in [Some(Ok(404)), Some(Err("timed out".into()))] {
            assert!(said(EDGECORE, &asked(ok200(), slices)).contains("dynamicController.enable: true"));
        }
        assert!(said(EDGECORE, &asked(Some(Ok(500)), None)).contains("dynamicController.enable: true"));
        assert!(said(EDGECORE, &asked(Some(Ok(401)), None)).contains("requireAuthorization"));
    }

    #[test]
    fn dns_of_pods() {
        let said = |edgecore: Option<&str>, kubelet: Option<&str>, take_over| {
            cluster_dns(edgecore, kubelet, "169.254.96.16", take_over).map(|l| l.verdict)
        };
        let old = "modules:\n  edged:\n    clusterDNS: 169.254.96.16\n";
        assert_eq!(said(Some(EDGECORE), None, false).as_deref(), Some("ok"));
        assert_eq!(said(Some(old), None, false).as_deref(), Some("ok"));
        assert_eq!(said(Some("modules:\n"), None, false).as_deref(), Some("warn"));
        assert_eq!(said(None, Some("clusterDNS:\n- 10.96.0.10\n"), false).as_deref(), Some("warn"));
        assert_eq!(said(None, Some("clusterDNS:\n- 10.96.0.10\n"), true).as_deref(), Some("ok"));
        assert_eq!(said(None, None, false), None);
    }

    #[test]
    fn answers_of_the_api() {
        for (services, slices, expected) in [
            (Ok(200), Some(Ok(200)), "ok https://x lets us list"),
            (Ok(200), Some(Ok(404)), "ok https://x answers, and has no"),
            (Ok(401), None, "fail https://x answers 401 for services: the token"),
            (
                Ok(200),
                Some(Ok(403)),
                "fail https://x answers 403 for endpointslices: it does not let us list them bind",
            ),
            (Ok(503), None, "fail https://x answers 503 for services is that"),
            (Err("nobody".to_owned()), None, "fail https://x: nobody mend"),
        ] {
            let line = api(&Asked { at: "https://x".into(), services: Some(services), slices, node: None });
            let said = [line.verdict, line.text, line.remedy].join(" ");
            assert!(said.starts_with(expected), "{said}");
        }
    }
}
