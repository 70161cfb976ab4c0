use super::*;

/// A message as it is laid out in the headers: numbers in the order of the host.
macro_rules! bytes {
    ($($value:expr),* $(,)?) => {{
        let mut out: Vec<u8> = Vec::new();
        $(out.extend($value.to_ne_bytes());)*
        out
    }};
}

fn with(mut a: Vec<u8>, b: &[u8]) -> Vec<u8> {
    a.extend(b);
    a
}

#[test]
fn golden_create() {
    let mut want = bytes![72_u32, 16_u16, 0x605_u16, 7_u32, 0_u32];
    want.extend([0; 16]);
    want = with(with(want, &bytes![10_u16, 3_u16]), b"weft0\0\0\0");
    want = with(with(want, &bytes![10_u16, 1_u16]), b"\x02weft0\0\0");
    want = with(want, &bytes![16_u16, 0x8012_u16, 10_u16, 1_u16]);
    want.extend(b"bridge\0\0");
    assert_eq!(create_link(7, "weft0", DeviceKind::Bridge), want);
}

#[test]
fn golden_route() {
    let mut want = bytes![52_u32, 24_u16, 0x605_u16, 9_u32, 0_u32];
    want.extend([2, 16, 0, 0, 254, 0x77, 253, 1, 0, 0, 0, 0]);
    want = with(with(want, &bytes![8_u16, 1_u16]), &[10, 96, 0, 0]);
    want = with(want, &bytes![8_u16, 4_u16, 5_u32, 8_u16, 6_u16, u32::MAX]);
    assert_eq!(add_route(9, 5, Net::new([10, 96, 3, 4].into(), 16)), want);
}

#[test]
fn golden_address() {
    let mut want = bytes![40_u32, 20_u16, 0x605_u16, 1_u32, 0_u32];
    want.extend([2, 32, 0, 253]);
    want = with(want, &bytes![5_u32, 8_u16, 2_u16]);
    want.extend([169, 254, 96, 16]);
    want = with(want, &bytes![8_u16, 1_u16]);
    want.extend([169, 254, 96, 16]);
    assert_eq!(add_address(1, 5, [169, 254, 96, 16].into()), want);
}

#[test]
fn what_we_send_is_read_back() {
    let text = create_link(1, "weft0", DeviceKind::Dummy);
    let want = Link { name: "weft0".into(), mac: MAC.to_vec(), kind: "dummy".into(), ..Link::default() };
    assert_eq!(answers(&text).collect::<Vec<_>>(), [(1, Answer::Link(want))]);

    let to = Prefix::new([10, 96, 0, 0].into(), 12);
    let bytes = [add_route(2, 5, to.into()), add_address(3, 6, [10, 0, 0, 1].into())].concat();
    let route =
        Route { to, protocol: ROUTE_PROTOCOL, metric: METRIC, leads_out: true, devices: vec![5], gateways: vec![] };
    let local = Ipv4Addr::new(10, 0, 0, 1);
    let address = Address { index: 6, local, network: Prefix::new(local, 32) };
    let got: Vec<_> = answers(&bytes).collect();
    assert_eq!(got, [(2, Answer::Route(route)), (3, Answer::Address(address))]);
}

#[test]
fn a_default_route_over_two_links() {
    let hop = |index: u32, last: u8| {
        let hop = with(bytes![16_u16, 0_u16, index, 8_u16, RTA_GATEWAY], &[192, 0, 2, last]);
        assert_eq!(hop.len(), 16);
        hop
    };
    let mut fixed = vec![AF_INET, 0, 0, 0, 254, 3, 0, RTN_UNICAST];
    fixed.extend([0; 4]);
    let bytes = Message::new(RTM_NEWROUTE, 0, 4, &fixed)
        .attr(RTA_MULTIPATH, &[hop(2, 1), hop(3, 9)].concat())
        .attr(RTA_TABLE, &1000_u32.to_ne_bytes())
        .done();
    let Some((4, Answer::Route(route))) = answers(&bytes).next() else { panic!("no route") };
    assert_eq!((route.to.length(), route.devices), (0, vec![2, 3]));
    assert_eq!(route.gateways, [Ipv4Addr::new(192, 0, 2, 1), Ipv4Addr::new(192, 0, 2, 9)]);
    assert!(route.leads_out);
}

#[test]
fn addresses_and_routes_of_ipv6() {
    let global: Ipv6Addr = "2a0f::7".parse().unwrap();
    let address = |flags: u8, more: u32| {
        let mut fixed = vec![AF_INET6, 64, flags, 0];
        fixed.extend(3_u32.to_ne_bytes());
        let message = Message::new(RTM_NEWADDR, 0, 1, &fixed).attr(IFA_ADDRESS, &global.octets());
        let bytes = if more == 0 { message } else { message.attr(IFA_FLAGS, &more.to_ne_bytes()) }.done();
        let Some((1, Answer::Address6(address))) = answers(&bytes).next() else { panic!("no address") };
        assert_eq!((address.index, address.local, address.length), (3, global, 64));
        (address.temporary, address.fit)
    };
    assert_eq!(address(0x80, 0), (false, true));
    assert_eq!(address(0x01, 0x301), (true, true));
    assert_eq!(address(0x01, 0x21), (true, false), "deprecated");
    assert_eq!(address(0xc0, 0), (false, false), "tentative");

    // Ours: deprecated from the start; and a route.
    let own: Ipv6Addr = "fd77:6566:7430::16".parse().unwrap();
    let (sent, net) = (add_address(5, 6, own.into()), "fd00:96::/108".parse().unwrap());
    assert_eq!(sent[16..20], [AF_INET6, 128, IFA_F_NODAD, RT_SCOPE_LINK]);
    assert_eq!(sent[sent.len() - 20..][..12], bytes![20_u16, IFA_CACHEINFO, 0_u32, u32::MAX]);
    let bytes = [sent, add_route(6, 7, net)].concat();
    let want = [
        Answer::Address6(Address6 { index: 6, local: own, length: 128, temporary: false, fit: true }),
        Answer::Route6(Route6 {
            to: "fd00:96::".parse().unwrap(),
            length: 108,
            protocol: ROUTE_PROTOCOL,
            metric: METRIC,
            leads_out: true,
            devices: vec![7],
        }),
    ];
    assert_eq!(answers(&bytes).map(|(_, answer)| answer).collect::<Vec<_>>(), want);

    let mut fixed = vec![AF_INET6, 0, 0, 0, 254, 9, 0, RTN_UNICAST];
    fixed.extend([0; 4]);
    let bytes = Message::new(RTM_NEWROUTE, 0, 4, &fixed)
        .attr(RTA_OIF, &2_u32.to_ne_bytes())
        .attr(RTA_GATEWAY, &global.octets())
        .attr(RTA_PRIORITY, &1024_u32.to_ne_bytes())
        .done();
    let to = Ipv6Addr::UNSPECIFIED;
    let want = Route6 { to, length: 0, protocol: 9, metric: 1024, leads_out: true, devices: vec![2] };
    assert_eq!(answers(&bytes).collect::<Vec<_>>(), [(4, Answer::Route6(want))]);
    for len in 0..bytes.len() {
        assert!(!answers(&bytes[..len]).any(|(_, a)| matches!(a, Answer::Route6(_))), "{len}");
    }
}

#[test]
fn errors_and_ends() {
    let error = |code: i32| Message::new(NLMSG_ERROR, 0, 5, &code.to_ne_bytes()).done();
    let bytes = [error(0), error(-17), Message::new(NLMSG_DONE, 0, 6, &[0; 4]).done()].concat();
    let got: Vec<_> = answers(&bytes).collect();
    assert_eq!(got, [(5, Answer::Done), (5, Answer::Failed(17)), (6, Answer::Done)]);
}

#[test]
fn a_tables_use_is_in_network_order() {
    let bytes = Message::new(nft(0), 0, 1, &[2, 0, 0, 0])
        .attr(NFTA_TABLE_NAME, b"nat\0")
        .attr(NFTA_TABLE_USE, &[0, 0, 0, 3])
        .done();
    assert_eq!(answers(&bytes).collect::<Vec<_>>(), [(1, Answer::TableUse(3))]);
    assert_eq!(delete_nft_table(1, true, "nat").len(), 20 + 28 + 20);
}

#[test]
fn cut_and_flipped_messages_end_quietly() {
    let whole = [
        create_link(1, "weft0", DeviceKind::Bridge),
        add_route(2, 5, Prefix::new([10, 96, 0, 0].into(), 12).into()),
        add_address(3, 6, [10, 0, 0, 1].into()),
    ]
    .concat();
    for len in 0..whole.len() {
        assert!(answers(&whole[..len]).count() < 3);
    }
    for seed in crate::seeds(5_000) {
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut bytes = whole.clone();
        for _ in 0..rng.usize(1..8) {
            let at = rng.usize(..bytes.len());
            bytes[at] = rng.u8(..);
        }
        assert!(answers(&bytes).count() <= bytes.len(), "seed {seed}");
    }
}
