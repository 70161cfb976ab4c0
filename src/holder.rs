//! Who holds a port that we want: for an error that names him.

use std::{
    fs::{self, File},
    io::Read as _,
    net::{IpAddr, Ipv6Addr, SocketAddr},
};

/// Bytes read of one list of sockets: some 20,000 of them.
const LIST_MAX: u64 = 4 << 20;
/// State of a TCP socket that listens (linux/net/tcp_states.h), as /proc prints it.
const LISTENS: &str = "0A";

/// The process whose socket is in the way of a new one at this address: "dnsmasq (process 712)". None where it is not
/// found, or is another user's and we are not root.
#[must_use]
pub fn of(at: SocketAddr, is_tcp: bool) -> Option<String> {
    let name = if is_tcp { "tcp" } else { "udp" };
    let lists = [format!("/proc/net/{name}"), format!("/proc/net/{name}6")];
    let inode = lists.iter().find_map(|path| {
        let mut text = String::new();
        File::open(path).ok()?.take(LIST_MAX).read_to_string(&mut text).ok()?;
        inode(&text, at, is_tcp)
    })?;
    let socket = format!("socket:[{inode}]");
    for process in fs::read_dir("/proc").ok()?.flatten() {
        let file = process.file_name();
        let Some(id) = file.to_str().filter(|id| id.bytes().all(|b| b.is_ascii_digit())) else { continue };
        let Ok(files) = fs::read_dir(process.path().join("fd")) else { continue };
        if files.flatten().any(|f| fs::read_link(f.path()).is_ok_and(|to| to.as_os_str() == socket.as_str())) {
            let name = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            return Some(format!("{} (process {id})", name.trim_end()));
        }
    }
    None
}

/// The inode of the socket in a list of /proc/net that has the address, or any address of its port.
fn inode(list: &str, at: SocketAddr, is_tcp: bool) -> Option<u64> {
    list.lines().skip(1).find_map(|line| {
        let mut words = line.split_ascii_whitespace();
        let (ip, port) = words.nth(1)?.split_once(':')?;
        let state = words.nth(1)?;
        let inode = words.nth(5)?;
        let ip = address(ip)?;
        let taken = ip == at.ip() || ip.is_unspecified();
        let right = u16::from_str_radix(port, 16) == Ok(at.port()) && (!is_tcp || state == LISTENS);
        (taken && right).then(|| inode.parse().ok())?
    })
}

/// 32-bit words in hexadecimal, each as this machine stores it.
fn address(text: &str) -> Option<IpAddr> {
    let mut bytes = [0; 16];
    let words = text.len() / 8;
    for (at, word) in bytes.chunks_exact_mut(4).take(words).enumerate() {
        let number = u32::from_str_radix(text.get(8 * at..8 * at + 8)?, 16).ok()?;
        word.copy_from_slice(&number.to_ne_bytes());
    }
    match words {
        1 => Some(IpAddr::from([bytes[0], bytes[1], bytes[2], bytes[3]])),
        4 => Some(Ipv6Addr::from(bytes).to_canonical()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, UdpSocket};

    #[test]
    fn this_process_is_found_by_its_sockets() {
        let own = format!("(process {})", std::process::id());
        // Under emulation /proc/net is the host's, in the host's byte order: no address of it can be read.
        let emulated = cfg!(target_endian = "big");
        for any in ["0.0.0.0:0", "[::]:0", "127.0.0.1:0"].into_iter().take(if emulated { 2 } else { 3 }) {
            let Ok(udp) = UdpSocket::bind(any) else { continue };
            let tcp = TcpListener::bind(any).unwrap();
            for (port, is_tcp) in [(udp.local_addr().unwrap().port(), false), (tcp.local_addr().unwrap().port(), true)]
            {
                let at = SocketAddr::from(([127, 0, 0, 1], port));
                assert!(of(at, is_tcp).is_some_and(|who| who.ends_with(&own)), "{any} {is_tcp}");
            }
        }
        assert_eq!(of("127.0.0.1:1".parse().unwrap(), true), None);
    }

    #[test]
    fn only_listeners_of_the_address_or_of_all() {
        let word = |ip: [u8; 4]| format!("{:08X}", u32::from_ne_bytes(ip));
        let line = |ip: [u8; 4], state: &str, inode: u32| {
            format!(
                "  0: {}:0035 00000000:0000 {state} 00000000:00000000 00:00000000 00000000   0  0 {inode} 2 x 0\n",
                word(ip)
            )
        };
        let at: SocketAddr = "192.0.2.1:53".parse().unwrap();
        let list =
            String::from("  sl  local_address\n") + &line([192, 0, 2, 2], "0A", 7) + &line([192, 0, 2, 1], "01", 8);
        assert_eq!((inode(&list, at, true), inode(&list, at, false)), (None, Some(8)));
        let list = list + &line([0; 4], "0A", 9);
        assert_eq!(inode(&list, at, true), Some(9));
        assert_eq!(inode("x\n0: zz:35 0 0A", at, true), None);
    }
}
