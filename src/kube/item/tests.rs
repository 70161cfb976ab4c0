use super::*;
use crate::{
    kube::{
        json::{Part, Scanner},
        types::KEEP,
    },
    table::model::*,
};
use std::time::Duration;

fn reads(text: &str) -> Vec<Read> {
    let (mut scanner, mut rest, mut all) = (Scanner::new(KEEP), text.as_bytes(), Vec::new());
    while let Some(piece) = scanner.next(&mut rest).unwrap() {
        if piece.part != Part::Envelope {
            all.push(read(&piece, &mut |name| name.into()));
        }
    }
    scanner.finish().unwrap();
    all
}

fn one(text: &str) -> Read {
    let mut all = reads(text);
    assert_eq!(all.len(), 1, "{text}");
    all.remove(0)
}

fn service(spec: &str) -> Read {
    one(&format!(r#"{{"apiVersion":"v1","kind":"Service","metadata":{{"name":"web","namespace":"shop"}},{spec}}}"#))
}

fn good_service(spec: &str) -> Service {
    match service(spec) {
        Read::Objects(mut objects, None) if objects.len() == 1 => match objects.remove(0) {
            Object::Service(service) => service,
            other => panic!("{other:?}"),
        },
        other => panic!("{other:?}"),
    }
}

fn slice(rest: &str) -> Read {
    let meta = r#"{"name":"web-1","namespace":"shop","labels":{"kubernetes.io/service-name":"web"}}"#;
    one(&format!(r#"{{"apiVersion":"discovery.k8s.io/v1","kind":"EndpointSlice","metadata":{meta},{rest}}}"#))
}

fn good_slice(rest: &str) -> (Slice, Option<String>) {
    match slice(rest) {
        Read::Objects(mut objects, trouble) if objects.len() == 1 => match objects.remove(0) {
            Object::Slice(slice) => (slice, trouble.map(|t| t.to_string())),
            other => panic!("{other:?}"),
        },
        other => panic!("{other:?}"),
    }
}

fn error(read: Read) -> String {
    match read {
        Read::Bad(trouble) => trouble.to_string(),
        other => panic!("{other:?}"),
    }
}

fn addresses(of: &[&str]) -> Vec<std::net::IpAddr> {
    of.iter().map(|a| a.parse().unwrap()).collect()
}

#[test]
fn errors_name_the_object_and_the_field() {
    for (spec, expected) in [
        (r#""spec":{"ports":[{"port":80},{"port":70000}]}"#, "spec.ports[1].port: 70000 is not in 1..=65535"),
        (r#""spec":{"ports":[{"port":0}]}"#, "spec.ports[0].port: 0 is not in 1..=65535"),
        (r#""spec":{"ports":[{"port":80},{}]}"#, "spec.ports[1].port: is missing"),
        (r#""spec":{"ports":[{"port":"http"}]}"#, "spec.ports[0].port: expected a whole number"),
        (r#""spec":{"ports":[{"port":80.5}]}"#, "spec.ports[0].port: expected a whole number"),
        (r#""spec":{"ports":[{"port":99999999999999999999}]}"#, "spec.ports[0].port: expected a whole number"),
        (r#""spec":{"ports":{"port":80}}"#, "spec.ports: expected a list"),
        (r#""spec":{"ports":[{"name":true,"port":80}]}"#, "spec.ports[0].name: expected a string"),
        (r#""spec":{"ports":[80]}"#, "spec.ports[0]: expected an object"),
        (
            r#""spec":{"ports":[{"port":80,"protocol":"ICMP"}]}"#,
            "spec.ports[0].protocol: \"ICMP\" is not TCP, UDP or SCTP",
        ),
        (r#""spec":{"ports":[{"port":80,"nodePort":-1}]}"#, "spec.ports[0].nodePort: -1 is not in 1..=65535"),
        (r#""spec":{"clusterIPs":["10.0.0.1","10.0.0"]}"#, "spec.clusterIPs[1]: \"10.0.0\" is not an IP address"),
        (
            r#""spec":{"clusterIP":"127.0.0.1"}"#,
            "spec.clusterIP: 127.0.0.1 is not the address of one machine in the network",
        ),
        (r#""spec":{"type":"Strange"}"#, "spec.type: \"Strange\" is not known"),
        (r#""spec":{"type":"ExternalName"}"#, "spec.externalName: \"\" is no name of the DNS"),
        (r#""spec":{"sessionAffinity":"Cookie"}"#, "spec.sessionAffinity: \"Cookie\" is not None or ClientIP"),
        (
            r#""spec":{"sessionAffinity":"ClientIP","sessionAffinityConfig":{"clientIP":{"timeoutSeconds":86401}}}"#,
            "spec.sessionAffinityConfig.clientIP.timeoutSeconds: 86401 is not in 1..=86400",
        ),
        (
            r#""spec":{"internalTrafficPolicy":"\u001b[2J"}"#,
            "spec.internalTrafficPolicy: \"\\u{1b}[2J\" is not Cluster or Local",
        ),
        (r#""spec":null"#, "spec: is missing"),
    ] {
        let read = service(spec);
        let Read::Bad(trouble) = &read else { panic!("{spec}: {read:?}") };
        let id = ServiceId { namespace: "shop".into(), name: "web".into() };
        assert_eq!(trouble.keep, [ObjectId::Service(id)], "{spec}");
        assert_eq!(error(read), format!("Service shop/web: {expected}"));
    }
    assert_eq!(
        error(slice(r#""addressType":"IPv4","endpoints":[{"conditions":{"ready":"yes"}}]"#)),
        "EndpointSlice shop/web-1: endpoints[0].conditions.ready: expected true or false"
    );
    for (text, expected) in [
        (r#"{"metadata":{"name":"x"}}"#, "the object at byte 0: kind: is missing"),
        (r#"{"kind":7}"#, "the object at byte 0: kind: expected a string"),
        (r#" {"kind":"Node"}"#, "Node in the object at byte 1: metadata.name: \"\" is no name of Kubernetes"),
        (
            r#"{"kind":"Service","metadata":{"name":"x","namespace":"a/b"}}"#,
            "Service in the object at byte 0: metadata.namespace: \"a/b\" is no name of Kubernetes",
        ),
        (r#"{"spec":{"type":"\ud800"}}"#, "the object at byte 0: spec.type: cannot read the string"),
        (r#"{"items":[7]}"#, "the object at byte 10: expected an object"),
    ] {
        assert_eq!(error(one(text)), expected);
    }
}

#[test]
fn a_bad_item_does_not_touch_the_others() {
    let list = r#"{"kind":"List","items":[
        {"kind":"Service","metadata":{"name":"a"},"spec":{"ports":[{"port":0}]}},
        {"kind":"Service","metadata":{"name":"b"},"spec":{"clusterIP":"10.0.0.1"}},
        {"kind":"Secret","metadata":{"name":"c"}},
        {"apiVersion":"serving.knative.dev/v1","kind":"Service","metadata":{"name":"d"}}]}"#;
    let reads = reads(list);
    assert!(
        matches!(&reads[..], [Read::Bad(_), Read::Objects(one, None), Read::Skipped, Read::Skipped] if one.len() == 1)
    );
}

#[test]
fn items_of_a_typed_list_take_its_kind() {
    let list = r#"{"kind":"ServiceList","apiVersion":"v1","items":[{"metadata":{"name":"a"},"spec":{}}]}"#;
    assert!(matches!(one(list), Read::Objects(..)));
    let late = r#"{"items":[{"metadata":{"name":"a"},"spec":{}}],"kind":"ServiceList"}"#;
    assert_eq!(error(one(late)), "the object at byte 10: kind: is missing");
}

#[test]
fn services_of_every_shape() {
    let minimal = good_service(r#""spec":{}"#);
    assert_eq!((minimal.kind, minimal.vips, minimal.affinity), (ServiceKind::ClusterIp, vec![].into(), Affinity::None));
    assert_eq!(good_service(r#""spec":{"clusterIP":"None","clusterIPs":["None"]}"#).kind, ServiceKind::Headless);
    let stale = r#""spec":{"type":"ExternalName","externalName":"Db.example.com","clusterIP":"10.0.0.1"}"#;
    let external = good_service(stale);
    assert_eq!((external.kind, external.vips), (ServiceKind::External("Db.example.com".into()), vec![].into()));
    let dual = good_service(r#""spec":{"clusterIP":"010.0.0.1","clusterIPs":["010.0.0.1","fd00::1"],"ports":null}"#);
    assert_eq!(*dual.vips, addresses(&["10.0.0.1", "fd00::1"]));
    let client_ip = |config: &str| {
        good_service(&format!(r#""spec":{{"sessionAffinity":"ClientIP","sessionAffinityConfig":{config}}}"#)).affinity
    };
    for (config, seconds) in [("null", 10_800), ("{}", 10_800), (r#"{"clientIP":{"timeoutSeconds":1}}"#, 1)] {
        assert_eq!(client_ip(config), Affinity::ClientIp { timeout: Duration::from_secs(seconds) });
    }
    assert!(good_service(r#""spec":{"internalTrafficPolicy":"Local"}"#).local_only);
    let ports = good_service(
        r#""spec":{"ports":[{"name":"dns","port":53,"protocol":"UDP","targetPort":"dns"},{"port":53,"nodePort":30053}]}"#,
    );
    let shown: Vec<_> = ports.ports.iter().map(|p| (&*p.name, p.number, p.protocol, p.node_port)).collect();
    assert_eq!(shown, [("dns", 53, Protocol::Udp, 0), ("", 53, Protocol::Tcp, 30_053)]);
}

#[test]
fn addresses_from_outside() {
    let read = service(
        r#""spec":{"externalIPs":["192.0.2.1","0.0.0.0","::1"]},"status":{"loadBalancer":{"ingress":[
            {"ip":"192.0.2.3","ipMode":"VIP"},{"ip":"192.0.2.4","ipMode":"Proxy"},{"hostname":"x"},{"ip":"192.0.2.2"}]}}"#,
    );
    let Read::Objects(objects, Some(trouble)) = read else { panic!("{read:?}") };
    let [Object::Service(service)] = &objects[..] else { panic!("{objects:?}") };
    assert_eq!(*service.external_ips, addresses(&["192.0.2.1", "192.0.2.2", "192.0.2.3"]));
    let why = "0.0.0.0 is not the address of one machine in the network: left out, and 1 more";
    assert_eq!(trouble.to_string(), format!("Service shop/web: spec.externalIPs[1]: {why}"));
    assert_eq!(trouble.keep, []);
}

#[test]
fn services_for_another_proxy() {
    for (labels, expected) in [
        (r#"{"service.kubernetes.io/service-proxy-name":"x"}"#, true),
        (r#"{"service.kubernetes.io/headless":""}"#, true),
        (r#"{"service.edgemesh.kubeedge.io/service-proxy-name":""}"#, true),
        (r#"{"app":"x"}"#, false),
        ("null", false),
    ] {
        let text = format!(r#"{{"kind":"Service","metadata":{{"name":"a","labels":{labels}}},"spec":{{}}}}"#);
        let Read::Objects(objects, None) = one(&text) else { panic!("{text}") };
        assert!(matches!(&objects[..], [Object::Service(s)] if s.not_proxied == expected), "{labels}");
    }
}

#[test]
fn conditions_that_are_absent_or_null() {
    for (conditions, state) in [
        ("null", (true, true, false)),
        ("{}", (true, true, false)),
        (r#"{"ready":null,"serving":null,"terminating":null}"#, (true, true, false)),
        (r#"{"ready":false}"#, (false, false, false)),
        (r#"{"ready":true,"serving":false}"#, (true, false, false)),
        (r#"{"ready":false,"serving":true,"terminating":true}"#, (false, true, true)),
    ] {
        let rest =
            format!(r#""addressType":"IPv4","endpoints":[{{"addresses":["10.1.0.1"],"conditions":{conditions}}}]"#);
        let (slice, trouble) = good_slice(&rest);
        let e = &slice.endpoints[0];
        assert_eq!((e.ready, e.serving, e.terminating), state, "{conditions}");
        assert_eq!(trouble, None);
    }
}

#[test]
fn bad_addresses_are_left_out_alone() {
    let (slice, trouble) = good_slice(
        r#""addressType":"IPv4","ports":[{"port":80},{"name":"all"},{"name":"u","port":53,"protocol":"UDP"}],"endpoints":[
            {"addresses":["127.0.0.1"]},{"addresses":["10.1.0.300"]},{"addresses":["10.001.0.1"],"nodeName":"edge-1",
             "zone":"north","hostname":"db-0","targetRef":{"kind":"Pod","name":"pod-1"}},
            {"addresses":["fd00::1"]},{"addresses":["::ffff:10.1.0.2"],"hostname":"Not A Name"},{"addresses":null}]"#,
    );
    let ips: Vec<_> = slice.endpoints.iter().map(|e| e.address).collect();
    assert_eq!(ips, addresses(&["10.1.0.1", "10.1.0.2"]));
    let first = &slice.endpoints[0];
    let names = [&first.hostname, &first.node, &first.zone, &first.pod].map(|n| n.as_deref().unwrap().to_owned());
    assert_eq!(names, ["db-0", "edge-1", "north", "pod-1"]);
    assert_eq!(slice.endpoints[1].hostname, None);
    assert_eq!(slice.ports.iter().map(|p| p.number).collect::<Vec<_>>(), [80, 53]);
    let why = "127.0.0.1 is not the address of one machine in the network: left out, and 2 more";
    assert_eq!(trouble.unwrap(), format!("EndpointSlice shop/web-1: endpoints[0].addresses[0]: {why}"));
}

#[test]
fn link_local_addresses_are_targets_at_most() {
    let endpoints = r#"{"addresses":["169.254.30.10"]},{"addresses":["169.254.169.254"]},{"addresses":["fe80::1"]}"#;
    let (slice, trouble) = good_slice(&format!(r#""endpoints":[{endpoints}]"#));
    let ips: Vec<_> = slice.endpoints.iter().map(|e| e.address).collect();
    assert_eq!(ips, addresses(&["169.254.30.10"]));
    assert!(trouble.unwrap().ends_with("left out, and 1 more"));
    assert!(matches!(service(r#""spec":{"clusterIP":"169.254.96.16"}"#), Read::Bad(_)));
}

#[test]
fn slices_that_are_none_of_ours() {
    let fqdn = slice(r#""addressType":"FQDN","endpoints":[{"addresses":["x.example.com"]}]"#);
    assert_eq!(fqdn, Read::Objects(vec![], None));
    let nobodys = r#"{"kind":"EndpointSlice","metadata":{"name":"x"},"addressType":"IPv4","endpoints":null}"#;
    assert_eq!(one(nobodys), Read::Objects(vec![], None));
}

#[test]
fn subsets_of_endpoints_become_slices() {
    let read = one(r#"{"kind":"Endpoints","metadata":{"name":"web","namespace":"shop"},"subsets":[
            {"addresses":[{"ip":"10.1.0.1","nodeName":"edge-1"}],"notReadyAddresses":[{"ip":"10.1.0.2"}],
             "ports":[{"name":"http","port":8080}]},
            {"addresses":[{"ip":"10.1.0.3"}],"ports":[{"name":"admin","port":8081}]}]}"#);
    let Read::Objects(objects, None) = read else { panic!("{read:?}") };
    let [Object::Slice(first), Object::Slice(second)] = &objects[..] else { panic!("{objects:?}") };
    assert!(first.id.is_subset() && &*second.id.name == "web/1" && &*second.service == "web");
    let states: Vec<_> = first.endpoints.iter().map(|e| (e.ready, e.serving)).collect();
    assert_eq!(states, [(true, true), (false, false)]);
    let bad = r#"{"kind":"Endpoints","metadata":{"name":"web","namespace":"shop"},"subsets":7}"#;
    let Read::Bad(trouble) = one(bad) else { panic!() };
    assert!(trouble.keep.contains(&ObjectId::Slice(first.id.clone())));
}

#[test]
fn nodes() {
    let read = one(
        r#"{"kind":"Node","metadata":{"name":"edge-1","labels":{"topology.kubernetes.io/zone":"north"}},"status":{"addresses":[
            {"type":"InternalIP","address":"203.0.113.1"},{"type":"Hostname","address":"edge-1"},
            {"type":"ExternalIP","address":"2001:db8::1"},{"type":"InternalDNS","address":"x"}],"conditions":[{"type":"Ready"}]}}"#,
    );
    let Read::Objects(objects, None) = read else { panic!("{read:?}") };
    let [Object::Node(node)] = &objects[..] else { panic!("{objects:?}") };
    assert_eq!((&*node.name, node.zone.as_deref()), ("edge-1", Some("north")));
    assert_eq!(node.addresses, addresses(&["203.0.113.1", "2001:db8::1"]));
}

#[test]
fn pods_that_have_ended_have_no_addresses() {
    let pod = |meta: &str, status: &str| {
        let read = one(&format!(
            r#"{{"kind":"Pod","metadata":{{"name":"p","namespace":"shop"{meta}}},"status":{{{status}}}}}"#
        ));
        match read {
            Read::Objects(mut objects, None) if objects.len() == 1 => match objects.remove(0) {
                Object::Pod(pod) => pod.addresses,
                other => panic!("{other:?}"),
            },
            other => panic!("{other:?}"),
        }
    };
    let ips = r#""podIP":"10.244.0.1","podIPs":[{"ip":"10.244.0.1"},{"ip":"fd00::1"}]"#;
    let both = addresses(&["10.244.0.1", "fd00::1", "10.244.0.1"]);
    assert_eq!(pod("", ips), both, "the table keeps each once");
    assert_eq!(pod("", &format!(r#""phase":"Running",{ips}"#)), both);
    assert_eq!(pod("", r#""phase":"Pending""#), addresses(&[]));
    assert_eq!(pod("", &format!(r#""phase":"Succeeded",{ips}"#)), addresses(&[]));
    assert_eq!(pod(r#","deletionTimestamp":"2026-11-21T00:00:00Z""#, ips), addresses(&[]));
}
