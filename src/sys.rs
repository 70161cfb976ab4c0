//! The only unsafe file: the system calls that neither std nor the event loop offers.
#![allow(unsafe_code)]

use std::{
    io, mem,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6, TcpListener, TcpStream, UdpSocket},
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
    ptr,
    time::Duration,
};

use libc::{c_int, c_void, socklen_t};

/// `IP6T_SO_ORIGINAL_DST`, linux/netfilter_ipv6/ip6_tables.h.
const IP6T_SO_ORIGINAL_DST: c_int = 80;

/// linux/netfilter_ipv4/ip_tables.h; that of ip6_tables is the same.
const IPT_SO_GET_INFO: c_int = 64;

/// Connections that the kernel keeps for us until they are accepted; it lowers this to net.core.somaxconn.
const BACKLOG: c_int = 1024;

/// File descriptors that we ask for at most: two sockets for each of half a million connections.
const NOFILE_MOST: libc::rlim_t = 1 << 20;

fn check(result: c_int) -> io::Result<c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn check_size(result: libc::ssize_t) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// The length of a value, which for the types of this file is below 2^31.
fn length<T>() -> socklen_t {
    mem::size_of::<T>() as socklen_t
}

pub(crate) fn set_option<T: Copy>(fd: &impl AsFd, level: c_int, name: c_int, value: T) -> io::Result<()> {
    // SAFETY: the pointer and the length are those of `value`, which lives through the call.
    let result = unsafe {
        libc::setsockopt(fd.as_fd().as_raw_fd(), level, name, (&raw const value).cast::<c_void>(), length::<T>())
    };
    check(result).map(drop)
}

/// What any bytes are a value of.
pub(crate) trait Plain: Copy {}
impl Plain for libc::sockaddr_storage {}
impl Plain for Control {}
impl<const N: usize> Plain for [u8; N] {}
impl<const N: usize> Plain for [u32; N] {}

/// The length that the kernel has written.
pub(crate) fn get_option<T: Plain>(fd: &impl AsFd, level: c_int, name: c_int, value: &mut T) -> io::Result<socklen_t> {
    let (mut len, at) = (length::<T>(), (&raw mut *value).cast::<c_void>());
    // SAFETY: the kernel writes at most `len` bytes into `value`.
    check(unsafe { libc::getsockopt(fd.as_fd().as_raw_fd(), level, name, at, &raw mut len) })?;
    Ok(len)
}

/// `ipt_getinfo`, linux/netfilter_ipv4/ip_tables.h: where a table's chains begin and end, and how many rules it has.
pub type TableInfo = [u8; 84];

/// What ip_tables, or by a socket of IPv6 ip6_tables, says of a table; its name has less than 32 bytes.
///
/// # Errors
/// As getsockopt(2); `PermissionDenied` without CAP_NET_ADMIN.
pub fn table_info(socket: &TcpStream, table: &str) -> io::Result<TableInfo> {
    let mut info = [0; size_of::<TableInfo>()];
    info.iter_mut().zip(table.bytes().take(31)).for_each(|(to, byte)| *to = byte);
    let level = if socket.local_addr()?.is_ipv4() { libc::SOL_IP } else { libc::SOL_IPV6 };
    get_option(socket, level, IPT_SO_GET_INFO, &mut info)?;
    Ok(info)
}

/// Where a connection was going before netfilter sent it to us.
///
/// # Errors
/// `NotFound` where the kernel does not track the connection.
pub fn original_dst(stream: &TcpStream) -> io::Result<SocketAddr> {
    let (level, name) = match stream.local_addr()? {
        SocketAddr::V4(_) => (libc::SOL_IP, libc::SO_ORIGINAL_DST),
        SocketAddr::V6(_) => (libc::SOL_IPV6, IP6T_SO_ORIGINAL_DST),
    };
    // SAFETY: all zeros is a valid sockaddr_storage, of no family.
    let mut raw: libc::sockaddr_storage = unsafe { mem::zeroed() };
    get_option(stream, level, name, &mut raw)?;
    from_raw(&raw).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// By which interface, named by its address, a UDP socket sends multicast from now on: to the link alone, and
/// not back to this host.
///
/// # Errors
/// `AddrNotAvailable` where no interface has the address.
pub fn multicast_by(fd: &impl AsFd, interface: Ipv4Addr) -> io::Result<()> {
    set_option(fd, libc::SOL_IP, libc::IP_MULTICAST_TTL, 1 as c_int)?;
    set_option(fd, libc::SOL_IP, libc::IP_MULTICAST_LOOP, 0 as c_int)?;
    set_option(fd, libc::SOL_IP, libc::IP_MULTICAST_IF, libc::in_addr { s_addr: u32::from(interface).to_be() })
}

/// IPv6 multicast of a socket does not come back to this host.
///
/// # Errors
/// As setsockopt(2).
pub fn multicast_stays(fd: &impl AsFd) -> io::Result<()> {
    set_option(fd, libc::SOL_IPV6, libc::IPV6_MULTICAST_LOOP, 0 as c_int)
}

/// By which interface a UDP socket sends to what is no multicast from now on, whatever the routing table prefers; 0:
/// as that says. The route must exist.
///
/// # Errors
/// As setsockopt(2).
pub fn unicast_by(fd: &impl AsFd, to_ipv6: bool, index: u32) -> io::Result<()> {
    // ip(7), ipv6(7): in network order.
    let (level, name) =
        if to_ipv6 { (libc::SOL_IPV6, libc::IPV6_UNICAST_IF) } else { (libc::SOL_IP, libc::IP_UNICAST_IF) };
    set_option(fd, level, name, index.to_be())
}

/// Sets the packet mark of a socket.
///
/// # Errors
/// `PermissionDenied` without CAP_NET_ADMIN.
pub fn set_mark(fd: &impl AsFd, mark: u32) -> io::Result<()> {
    set_option(fd, libc::SOL_SOCKET, libc::SO_MARK, mark)
}

/// Makes the close of a socket a reset (RFC 9293, 3.9.1: ABORT) instead of a FIN.
///
/// # Errors
/// As setsockopt(2).
pub fn reset_on_close(fd: &impl AsFd) -> io::Result<()> {
    set_option(fd, libc::SOL_SOCKET, libc::SO_LINGER, libc::linger { l_onoff: 1, l_linger: 0 })
}

/// linux/in.h, and linux/in6.h where it is `IPV6_2292PKTOPTIONS`.
const PKTOPTIONS: [c_int; 2] = [9, 6];

/// Room for one `in6_pktinfo` and others that the kernel may add; aligned as a `cmsghdr` is.
#[derive(Clone, Copy)]
#[repr(C, align(8))]
struct Control([u8; 256]);

/// Has a socket tell [`Batch`] or [`interface_of`] by which interface something came; what it accepts has it too.
///
/// # Errors
/// As setsockopt(2).
pub fn tell_interfaces(fd: &impl AsFd, is_v4: bool) -> io::Result<()> {
    match is_v4 {
        true => set_option(fd, libc::SOL_IP, libc::IP_PKTINFO, 1 as c_int),
        false => set_option(fd, libc::SOL_IPV6, libc::IPV6_RECVPKTINFO, 1 as c_int),
    }
}

/// The interface's index in control messages; 0: none says it.
fn interface_in(message: &libc::msghdr) -> u32 {
    let mut index = 0;
    // SAFETY: the kernel has filled the control buffer up to the length in the header, and the macros stay within it;
    // the data of a message is read unaligned and has the type that its level and kind name.
    unsafe {
        let mut next = libc::CMSG_FIRSTHDR(message);
        while let Some(header) = next.as_ref() {
            let data = libc::CMSG_DATA(next);
            match (header.cmsg_level, header.cmsg_type) {
                (libc::SOL_IP, libc::IP_PKTINFO) => {
                    index = data.cast::<libc::in_pktinfo>().read_unaligned().ipi_ifindex as u32;
                }
                (libc::SOL_IPV6, libc::IPV6_PKTINFO) => {
                    index = data.cast::<libc::in6_pktinfo>().read_unaligned().ipi6_ifindex as u32;
                }
                _ => {}
            }
            next = libc::CMSG_NXTHDR(message, next);
        }
    }
    index
}

/// Datagrams that are received, and answered, by one system call.
const BATCH: usize = 16;
/// A longer datagram is cut off.
const DATAGRAM: usize = 2048;

/// Room for one `in6_pktinfo`, the largest that is asked for; aligned as a `cmsghdr` is.
#[derive(Clone, Copy)]
#[repr(C, align(8))]
struct Pktinfo([u8; 64]);

/// Receives datagrams and sends an answer to each, in batches.
pub struct Batch {
    bytes: Vec<u8>,
    names: [libc::sockaddr_storage; BATCH],
    controls: [Pktinfo; BATCH],
    heads: [libc::mmsghdr; BATCH],
    answers: [Vec<u8>; BATCH],
    received: usize,
}

impl Default for Batch {
    fn default() -> Self {
        Self {
            bytes: vec![0; BATCH * DATAGRAM],
            // SAFETY: all zeros is a valid value of both, and a null pointer where there is one.
            names: unsafe { mem::zeroed() },
            controls: [Pktinfo([0; 64]); BATCH],
            // SAFETY: as above.
            heads: unsafe { mem::zeroed() },
            answers: Default::default(),
            received: 0,
        }
    }
}

impl Batch {
    /// How many datagrams there were.
    ///
    /// # Errors
    /// As recvmmsg(2).
    pub fn receive(&mut self, socket: &UdpSocket) -> io::Result<usize> {
        let Self { bytes, names, controls, heads, .. } = self;
        let mut parts = [libc::iovec { iov_base: ptr::null_mut(), iov_len: DATAGRAM }; BATCH];
        for (i, chunk) in bytes.chunks_exact_mut(DATAGRAM).enumerate() {
            parts[i].iov_base = chunk.as_mut_ptr().cast();
            let head = &mut heads[i].msg_hdr;
            head.msg_name = (&raw mut names[i]).cast();
            head.msg_namelen = length::<libc::sockaddr_storage>();
            head.msg_iov = &raw mut parts[i];
            head.msg_iovlen = 1;
            head.msg_control = controls[i].0.as_mut_ptr().cast();
            head.msg_controllen = controls[i].0.len() as _;
        }
        // SAFETY: every pointer in the headers is to something that lives through the call, with its length beside it.
        let n =
            check(unsafe { libc::recvmmsg(socket.as_raw_fd(), heads.as_mut_ptr(), BATCH as _, 0, ptr::null_mut()) })?;
        self.received = usize::try_from(n).unwrap_or(0).min(BATCH);
        Ok(self.received)
    }

    /// Gives each datagram with its source and the index of its interface (0 where the socket does not tell); true: what
    /// is in the buffer then is its answer.
    pub fn each(&mut self, mut answer: impl FnMut(&[u8], SocketAddr, u32, &mut Vec<u8>) -> bool) {
        for i in 0..self.received {
            let head = &self.heads[i];
            let message = &self.bytes[i * DATAGRAM..][..(head.msg_len as usize).min(DATAGRAM)];
            let out = &mut self.answers[i];
            let answered =
                from_raw(&self.names[i]).is_some_and(|from| answer(message, from, interface_in(&head.msg_hdr), out));
            if !answered {
                out.clear();
            }
        }
    }

    /// Sends the answers that [`Self::each`] has brought. One that the kernel does not take is lost.
    ///
    /// # Errors
    /// The last of sendmmsg(2).
    pub fn send(&mut self, socket: &UdpSocket) -> io::Result<()> {
        let Self { names, heads, answers, received, .. } = self;
        let mut parts = [libc::iovec { iov_base: ptr::null_mut(), iov_len: 0 }; BATCH];
        let mut count = 0;
        for (i, out) in answers[..*received].iter_mut().enumerate().filter(|(_, out)| !out.is_empty()) {
            parts[count] = libc::iovec { iov_base: out.as_mut_ptr().cast(), iov_len: out.len() };
            let head = &mut heads[count].msg_hdr;
            head.msg_name = (&raw mut names[i]).cast();
            head.msg_namelen = length_of(&names[i]);
            head.msg_iov = &raw mut parts[count];
            head.msg_iovlen = 1;
            head.msg_control = ptr::null_mut();
            head.msg_controllen = 0;
            count += 1;
        }
        let (mut sent, mut result) = (0, Ok(()));
        while sent < count {
            let rest = &mut heads[sent..count];
            // SAFETY: as in `receive`.
            let done = unsafe { libc::sendmmsg(socket.as_raw_fd(), rest.as_mut_ptr(), rest.len() as _, 0) };
            match check(done) {
                Ok(n) => sent += usize::try_from(n).unwrap_or(0).max(1),
                Err(e) => {
                    sent += 1;
                    result = Err(e);
                }
            }
        }
        *received = 0;
        result
    }
}

fn length_of(name: &libc::sockaddr_storage) -> socklen_t {
    match c_int::from(name.ss_family) {
        libc::AF_INET => length::<libc::sockaddr_in>(),
        _ => length::<libc::sockaddr_in6>(),
    }
}

fn from_raw(name: &libc::sockaddr_storage) -> Option<SocketAddr> {
    match c_int::from(name.ss_family) {
        libc::AF_INET => {
            // SAFETY: a sockaddr_storage has room and alignment for it, and the family says that it is one.
            let raw = unsafe { (&raw const *name).cast::<libc::sockaddr_in>().read() };
            Some(SocketAddr::from((Ipv4Addr::from(u32::from_be(raw.sin_addr.s_addr)), u16::from_be(raw.sin_port))))
        }
        libc::AF_INET6 => {
            // SAFETY: as above.
            let raw = unsafe { (&raw const *name).cast::<libc::sockaddr_in6>().read() };
            let ip = Ipv6Addr::from(raw.sin6_addr.s6_addr);
            Some(SocketAddrV6::new(ip, u16::from_be(raw.sin6_port), 0, raw.sin6_scope_id).into())
        }
        _ => None,
    }
}

/// By which interface an accepted connection came; 0 where its listener was not told to tell.
///
/// # Errors
/// As getsockopt(2).
pub fn interface_of(stream: &TcpStream) -> io::Result<u32> {
    let mut control = Control([0; 256]);
    let (level, name) = match stream.local_addr()? {
        SocketAddr::V4(_) => (libc::SOL_IP, PKTOPTIONS[0]),
        SocketAddr::V6(_) => (libc::SOL_IPV6, PKTOPTIONS[1]),
    };
    let len = get_option(stream, level, name, &mut control)?;
    // SAFETY: all zeros is a valid msghdr.
    let mut message: libc::msghdr = unsafe { mem::zeroed() };
    message.msg_control = control.0.as_mut_ptr().cast();
    message.msg_controllen = len as _;
    Ok(interface_in(&message))
}

fn socket(domain: c_int, kind: c_int, protocol: c_int) -> io::Result<OwnedFd> {
    // SAFETY: no pointers.
    let fd = check(unsafe { libc::socket(domain, kind | libc::SOCK_CLOEXEC, protocol) })?;
    // SAFETY: the descriptor is new and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn domain(address: &SocketAddr) -> c_int {
    match address {
        SocketAddr::V4(_) => libc::AF_INET,
        SocketAddr::V6(_) => libc::AF_INET6,
    }
}

/// Calls `f` with the raw form of an address.
fn with_raw(address: &SocketAddr, f: impl FnOnce(*const libc::sockaddr, socklen_t) -> c_int) -> io::Result<()> {
    let result = match address {
        SocketAddr::V4(v4) => {
            // SAFETY: all zeros is a valid sockaddr_in.
            let mut raw: libc::sockaddr_in = unsafe { mem::zeroed() };
            raw.sin_family = libc::AF_INET as libc::sa_family_t;
            raw.sin_port = v4.port().to_be();
            raw.sin_addr.s_addr = u32::from(*v4.ip()).to_be();
            f((&raw const raw).cast(), length::<libc::sockaddr_in>())
        }
        SocketAddr::V6(v6) => {
            // SAFETY: all zeros is a valid sockaddr_in6.
            let mut raw: libc::sockaddr_in6 = unsafe { mem::zeroed() };
            raw.sin6_family = libc::AF_INET6 as libc::sa_family_t;
            raw.sin6_port = v6.port().to_be();
            raw.sin6_addr.s6_addr = v6.ip().octets();
            raw.sin6_scope_id = v6.scope_id();
            f((&raw const raw).cast(), length::<libc::sockaddr_in6>())
        }
    };
    check(result).map(drop)
}

/// Binds to an address that need not exist yet, so that our ports are known before weft0 is made.
fn bind_early(kind: c_int, address: &SocketAddr) -> io::Result<OwnedFd> {
    let fd = socket(domain(address), kind | libc::SOCK_NONBLOCK, 0)?;
    match address {
        SocketAddr::V4(_) => set_option(&fd, libc::SOL_IP, libc::IP_FREEBIND, 1 as c_int)?,
        SocketAddr::V6(_) => set_option(&fd, libc::SOL_IPV6, libc::IPV6_FREEBIND, 1 as c_int)?,
    }
    if kind == libc::SOCK_STREAM {
        // What is left of old connections must not keep a fixed port from us.
        set_option(&fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1 as c_int)?;
    }
    // SAFETY: `with_raw` gives a pointer and length that are valid during the call.
    with_raw(address, |raw, len| unsafe { libc::bind(fd.as_raw_fd(), raw, len) })?;
    Ok(fd)
}

/// A non-blocking listener on an address that need not exist yet.
///
/// # Errors
/// As bind(2) and listen(2).
pub fn tcp_listener(address: &SocketAddr) -> io::Result<TcpListener> {
    let fd = bind_early(libc::SOCK_STREAM, address)?;
    // SAFETY: no pointers.
    check(unsafe { libc::listen(fd.as_raw_fd(), BACKLOG) })?;
    Ok(fd.into())
}

/// A non-blocking UDP socket on an address that need not exist yet.
///
/// # Errors
/// As bind(2).
pub fn udp_socket(address: &SocketAddr) -> io::Result<UdpSocket> {
    bind_early(libc::SOCK_DGRAM, address).map(Into::into)
}

/// A non-blocking TCP socket that is not connected yet, of the family of `to`.
///
/// # Errors
/// As socket(2): too many open files, above all.
pub fn tcp_socket(to: &SocketAddr) -> io::Result<TcpStream> {
    socket(domain(to), libc::SOCK_STREAM | libc::SOCK_NONBLOCK, 0).map(Into::into)
}

/// Starts to connect; the socket is writable when that has succeeded or failed.
///
/// # Errors
/// As connect(2), where it fails at once.
pub fn connect(stream: &TcpStream, to: &SocketAddr) -> io::Result<()> {
    // SAFETY: `with_raw` gives a pointer and length that are valid during the call.
    match with_raw(to, |raw, len| unsafe { libc::connect(stream.as_raw_fd(), raw, len) }) {
        Err(e) if e.raw_os_error() == Some(libc::EINPROGRESS) => Ok(()),
        done => done,
    }
}

/// Removes up to `len` bytes that are waiting in a TCP socket without copying them (tcp(7): MSG_TRUNC).
///
/// # Errors
/// As recv(2).
pub fn discard(stream: &TcpStream, len: usize) -> io::Result<usize> {
    let flags = libc::MSG_TRUNC | libc::MSG_DONTWAIT;
    // SAFETY: with MSG_TRUNC a TCP socket writes nothing to the buffer.
    check_size(unsafe { libc::recv(stream.as_raw_fd(), ptr::null_mut(), len, flags) })
}

/// A non-blocking pipe: reading end, writing end. It holds `capacity` bytes where the kernel grants that.
///
/// # Errors
/// As pipe2(2).
pub fn pipe(capacity: c_int) -> io::Result<(OwnedFd, OwnedFd)> {
    let mut ends: [c_int; 2] = [-1; 2];
    // SAFETY: the kernel writes two descriptors.
    check(unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC | libc::O_NONBLOCK) })?;
    // SAFETY: no pointers. A refusal (fs.pipe-user-pages-soft) leaves the default size.
    unsafe { libc::fcntl(ends[0], libc::F_SETPIPE_SZ, capacity) };
    // SAFETY: both are new and nobody else's.
    Ok(unsafe { (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1])) })
}

/// Moves up to `len` bytes between a pipe and a socket, without waiting; 0 is the end of the source.
/// A socket whose reader is gone raises SIGPIPE: the process must ignore it, as Rust's does by itself.
///
/// # Errors
/// As splice(2).
pub fn splice(from: &impl AsFd, to: &impl AsFd, len: usize) -> io::Result<usize> {
    let flags = libc::SPLICE_F_NONBLOCK | libc::SPLICE_F_MOVE;
    let (from, to) = (from.as_fd().as_raw_fd(), to.as_fd().as_raw_fd());
    // SAFETY: null offsets, as pipes and sockets need.
    check_size(unsafe { libc::splice(from, ptr::null_mut(), to, ptr::null_mut(), len, flags) })
}

/// The kernel's netlink families that we speak to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    Route,
    Netfilter,
}

/// A netlink socket. `groups` is the bit mask of the multicast groups to hear; a call waits at most `patience`.
///
/// # Errors
/// As socket(2) and bind(2).
pub fn netlink(family: Family, groups: u32, patience: Duration) -> io::Result<OwnedFd> {
    let protocol = match family {
        Family::Route => libc::NETLINK_ROUTE,
        Family::Netfilter => libc::NETLINK_NETFILTER,
    };
    let fd = socket(libc::AF_NETLINK, libc::SOCK_RAW, protocol)?;
    // SAFETY: all zeros is a valid timeval; the fields' widths differ between platforms.
    let mut wait: libc::timeval = unsafe { mem::zeroed() };
    wait.tv_sec = i32::try_from(patience.as_secs()).unwrap_or(i32::MAX).into();
    set_option(&fd, libc::SOL_SOCKET, libc::SO_RCVTIMEO, wait)?;
    // SAFETY: all zeros is a valid sockaddr_nl.
    let mut address: libc::sockaddr_nl = unsafe { mem::zeroed() };
    address.nl_family = libc::AF_NETLINK as libc::sa_family_t;
    address.nl_groups = groups;
    // SAFETY: pointer and length are those of `address`.
    let result = unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), length::<libc::sockaddr_nl>()) };
    check(result)?;
    Ok(fd)
}

/// Makes room for one datagram of this size; netlink takes a whole transaction as one.
///
/// # Errors
/// `PermissionDenied` without CAP_NET_ADMIN, where it is more than everybody may have.
pub fn room_to_send(fd: &impl AsFd, size: usize) -> io::Result<()> {
    // net.core.wmem_default is 212,992 on a kernel that nobody tuned, and netlink keeps 32 bytes for itself.
    const GIVEN: usize = 128 * 1024;
    if size <= GIVEN {
        return Ok(());
    }
    let wanted = c_int::try_from(size + 4_096).map_err(|_| io::ErrorKind::InvalidInput)?;
    set_option(fd, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, wanted)
}

/// Sends one datagram.
///
/// # Errors
/// As send(2).
pub fn send(fd: &impl AsFd, bytes: &[u8]) -> io::Result<()> {
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: pointer and length are those of `bytes`.
    let sent = check_size(unsafe { libc::send(fd, bytes.as_ptr().cast(), bytes.len(), libc::MSG_NOSIGNAL) })?;
    if sent == bytes.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

/// Receives one datagram.
///
/// # Errors
/// As recv(2); `InvalidData` where the datagram is larger than the buffer.
pub fn receive<'b>(fd: &impl AsFd, buffer: &'b mut [u8], wait: bool) -> io::Result<&'b [u8]> {
    let flags = libc::MSG_TRUNC | if wait { 0 } else { libc::MSG_DONTWAIT };
    // SAFETY: the kernel writes at most the buffer's length.
    let result = unsafe { libc::recv(fd.as_fd().as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), flags) };
    buffer.get(..check_size(result)?).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// Raises the limit of open files as far as we may, and returns it.
///
/// # Errors
/// As getrlimit(2).
pub fn raise_nofile() -> io::Result<u64> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the kernel fills `limit`.
    check(unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) })?;
    let raised = libc::rlimit { rlim_cur: limit.rlim_max.min(NOFILE_MOST), ..limit };
    // SAFETY: the kernel reads `raised`. A refusal, by a filter of system calls, leaves what there is.
    if limit.rlim_cur < raised.rlim_cur && unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const raised) } == 0 {
        limit = raised;
    }
    Ok(limit.rlim_cur)
}

/// A descriptor from which these signals are read, the number first (signalfd(2)); here, and in threads that are
/// started from now on, they do nothing else any more. Programs that std starts have none blocked.
///
/// # Errors
/// As pthread_sigmask(3) and signalfd(2).
pub fn signals(wanted: &[c_int]) -> io::Result<OwnedFd> {
    // SAFETY: sigset_t is plain data, of which the kernel reads what these calls have set.
    unsafe {
        let mut set: libc::sigset_t = mem::zeroed();
        for &signal in wanted {
            check(libc::sigaddset(&raw mut set, signal))?;
        }
        check(-libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, ptr::null_mut()))?;
        let fd = check(libc::signalfd(-1, &raw const set, libc::SFD_NONBLOCK | libc::SFD_CLOEXEC))?;
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

#[cfg(test)]
mod tests;
