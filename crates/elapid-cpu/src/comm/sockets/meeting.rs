//! How the ranks find each other.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

use super::super::CommFailure;
use super::{GREETING, HEAD, PATIENCE, Place, failure, head, read_head, read_words, words};

/// Where all ranks listen, and the connections over which that became known, by rank.
pub(super) type Met = (Vec<SocketAddr>, Vec<(usize, TcpStream)>);

/// Rank 0 waits for the others and tells them where each one listens.
pub(super) fn gather_addresses(
    place: &Place,
    port: u16,
    timeout: Duration,
    end: Instant,
) -> Result<Met, CommFailure> {
    let cannot =
        |cause: std::io::Error| failure(0, format!("rank 0 cannot listen on port {}: {cause}", place.port));
    let listener = TcpListener::bind(("0.0.0.0", place.port)).map_err(cannot)?;
    listener.set_nonblocking(true).map_err(cannot)?;
    let mut others: Vec<Option<(TcpStream, SocketAddr)>> = (1..place.ranks).map(|_| None).collect();
    while others.iter().any(Option::is_none) {
        if Instant::now() > end {
            let missing = (1..).zip(&others).filter(|(_, other)| other.is_none());
            let missing: Vec<_> = missing.map(|(rank, _): (usize, _)| rank.to_string()).collect();
            let who = if missing.len() == 1 { "rank" } else { "ranks" };
            let (missing, ranks) = (missing.join(", "), place.ranks);
            let message = format!("{who} {missing} of {ranks} did not come in {} s", timeout.as_secs_f32());
            return Err(failure(0, message));
        }
        let Ok((mut stream, address)) = listener.accept() else {
            std::thread::sleep(Duration::from_millis(10));
            continue;
        };
        // Who is no rank of ours, or says nothing, is passed over.
        let Ok([GREETING, rank, ranks, port]) = read_words(&mut stream) else { continue };
        let (rank, ranks) = (rank as usize, ranks as usize);
        if ranks != place.ranks {
            let message = format!("rank {rank} counts {ranks} ranks, and rank 0 counts {}", place.ranks);
            return Err(failure(rank, message));
        }
        match rank.checked_sub(1).and_then(|at| others.get_mut(at)) {
            Some(other @ None) => *other = Some((stream, SocketAddr::new(address.ip(), port as u16))),
            Some(_) => return Err(failure(rank, format!("rank {rank} came twice"))),
            None => {}
        }
    }
    let (mut streams, addresses): (Vec<_>, Vec<_>) = others.into_iter().flatten().unzip();
    // Whoever came over this host's loopback is found where rank 0 is found.
    let here = SocketAddr::from(([0, 0, 0, 0], port));
    let all: Vec<_> = std::iter::once(here).chain(addresses).collect();
    let line = |address: &SocketAddr| match address.ip() {
        ip if ip.is_loopback() || ip.is_unspecified() => format!("{}\n", address.port()),
        ip => format!("{ip} {}\n", address.port()),
    };
    let table: String = all.iter().map(line).collect();
    let frame = [&head(0, table.len())[..], table.as_bytes()].concat();
    for (rank, stream) in (1..).zip(&mut streams) {
        stream.write_all(&frame).map_err(|_| failure(rank, format!("rank {rank} is gone")))?;
    }
    Ok((all, (1..).zip(streams).collect()))
}

/// Another rank tells rank 0 where it listens, and learns it of all.
pub(super) fn tell_address(
    place: &Place,
    port: u16,
    timeout: Duration,
    end: Instant,
) -> Result<Met, CommFailure> {
    let Place { rank, ranks, .. } = *place;
    let hello = words([GREETING, rank as u32, ranks as u32, u32::from(port)]);
    let connect = || {
        let addresses = (place.root.as_str(), place.port).to_socket_addrs().into_iter().flatten();
        addresses.into_iter().find_map(|address| {
            let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(2)).ok()?;
            stream.write_all(&hello).ok()?;
            Some((stream, address.ip()))
        })
    };
    let (mut stream, root) = loop {
        if let Some(found) = connect() {
            break found;
        }
        if Instant::now() > end {
            let seconds = timeout.as_secs_f32();
            let message =
                format!("rank {rank} has waited {seconds} s for rank 0 at {}:{}", place.root, place.port);
            return Err(failure(0, message));
        }
        std::thread::sleep(Duration::from_millis(50));
    };
    let mut table = || {
        // Rank 0 may itself wait that long for the last.
        stream.set_read_timeout(Some(timeout + PATIENCE))?;
        let mut head = [0; HEAD];
        stream.read_exact(&mut head)?;
        let mut text = vec![0; read_head(&head).1.min(1 << 24)];
        stream.read_exact(&mut text)?;
        Ok::<_, std::io::Error>(String::from_utf8_lossy(&text).into_owned())
    };
    let gone = || failure(0, "rank 0 is gone before all ranks had come".into());
    let table = table().map_err(|_| gone())?;
    let address = |line: &str| -> Option<SocketAddr> {
        let (ip, port) = line.split_once(' ').unwrap_or(("", line));
        let ip: IpAddr = if ip.is_empty() { root } else { ip.parse().ok()? };
        Some(SocketAddr::new(ip, port.parse().ok()?))
    };
    let all = table.lines().map(address).collect::<Option<Vec<_>>>().filter(|all| all.len() == ranks);
    Ok((all.ok_or_else(gone)?, vec![(0, stream)]))
}
