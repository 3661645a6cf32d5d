//! Ranks that are processes, over TCP: for those that no MPI connects, such as one process a core of an accelerator.
//!
//! Each rank listens at a port of its own and tells rank 0, which waits at one that all know, and answers with the
//! addresses of all. Then any two ranks of a group have a connection. What travels on it are frames: a word that says
//! which collective it belongs to, a length, bytes. A rank that fails says why in a last frame; one that is killed is known
//! by the end of its connections.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::trade::{self, Trade};
use super::{CommFailure, Communicator, FloatsMut, Reduce, Single};

/// Where the ranks meet.
#[derive(Clone, Debug)]
pub struct Place {
    /// The number of this one, from 0.
    pub rank: usize,
    /// How many there are.
    pub ranks: usize,
    /// The host of rank 0.
    pub root: String,
    /// A free port there.
    pub port: u16,
}

/// The first word that a rank of this program says, and of no other version of this protocol.
const GREETING: u32 = 0x454c_5031;

/// Collectives, by their words in frames.
const NAMES: [&str; 6] = ["", "all_reduce", "reduce_scatter", "all_gather", "broadcast", "barrier"];

/// The word of a rank's last frame: its bytes say why it ends.
const FAILED: u8 = u8::MAX;

/// The word of the last frame of a rank that has come to its end.
const DONE: u8 = u8::MAX - 1;

/// Word and length.
const HEAD: usize = 9;

/// How long somebody who has connected may take to say who it is.
const PATIENCE: Duration = Duration::from_secs(5);

/// All ranks.
pub struct World {
    place: Place,
    timeout: Duration,
    /// Where ranks of lower numbers find this one.
    listener: TcpListener,
    addresses: Vec<SocketAddr>,
    /// Connections that other ranks have made for groups that this one is still to make: (group, rank).
    early: Mutex<Vec<(u32, usize, TcpStream)>>,
    links: Mutex<Vec<Arc<Link>>>,
    /// Where this rank met the others, which nothing passes any more but how they end: of rank 0 to all, else to rank 0.
    watched: Vec<Arc<Link>>,
    all: Arc<dyn Communicator>,
}

/// A connection to another rank.
#[derive(Debug)]
struct Link {
    /// Its number in the world.
    rank: usize,
    stream: TcpStream,
    /// A frame is on its way there in part, or was the last.
    torn: AtomicBool,
    /// That rank has told why it ends.
    told: AtomicBool,
    end: Mutex<End>,
}

/// What is known of a rank's end.
#[derive(Debug, Default)]
struct End {
    /// What has come beside collectives.
    bytes: Vec<u8>,
    /// Once it is known; None inside: it has come to its end as it should.
    why: Option<Option<CommFailure>>,
}

/// What a rank has found that it cannot go on with.
fn failure(rank: usize, message: String) -> CommFailure {
    CommFailure { rank, message }
}

impl World {
    /// Brings the ranks together.
    ///
    /// # Errors
    /// Not all have come in `timeout`: those missing are named.
    pub fn meet(place: Place, timeout: Duration) -> Result<Self, CommFailure> {
        let end = Instant::now() + timeout;
        let own = |cause: std::io::Error| {
            failure(place.rank, format!("rank {} cannot listen: {cause}", place.rank))
        };
        let listener = TcpListener::bind(("0.0.0.0", 0)).map_err(own)?;
        let port = listener.local_addr().map_err(own)?.port();
        let (addresses, met) = match place.rank {
            0 => gather_addresses(&place, port, timeout, end)?,
            _ => tell_address(&place, port, timeout, end)?,
        };
        let all: Arc<dyn Communicator> = Arc::new(Single);
        let (early, links) = (Mutex::default(), Mutex::default());
        let mut world = Self { place, timeout, listener, addresses, early, links, watched: Vec::new(), all };
        for (rank, stream) in met {
            world.watched.push(Arc::new(world.link(rank, stream)?));
        }
        world.links().extend(world.watched.iter().cloned());
        let ranks: Vec<_> = (0..world.place.ranks).collect();
        world.all = world.group(&ranks, 0)?;
        Ok(world)
    }

    /// Where this rank is.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// All ranks as one group.
    pub fn all(&self) -> Arc<dyn Communicator> {
        self.all.clone()
    }

    /// The group of these `ranks`, of which this is one, in their order. All of them call this together; `number` is another
    /// one for each group of a rank, above 0, and the same on all ranks of the group.
    ///
    /// # Errors
    /// One of them is gone, or does not come in time.
    pub fn group(&self, ranks: &[usize], number: u32) -> Result<Arc<dyn Communicator>, CommFailure> {
        if ranks.len() == 1 {
            return Ok(Arc::new(Single));
        }
        let end = Instant::now() + self.timeout;
        let own = self.place.rank;
        let mut links = Vec::new();
        for &rank in ranks {
            links.push(match rank.cmp(&own) {
                std::cmp::Ordering::Equal => None,
                std::cmp::Ordering::Less => Some(self.connect(rank, number, end)?),
                std::cmp::Ordering::Greater => Some(self.accept(rank, number, end)?),
            });
        }
        let links: Vec<Option<Arc<Link>>> = links.into_iter().map(|link| link.map(Arc::new)).collect();
        self.links().extend(links.iter().flatten().cloned());
        let rank = ranks.iter().position(|rank| *rank == own).expect("this rank is one of them");
        Ok(Arc::new(Group { rank, own, links, timeout: self.timeout }))
    }

    fn links(&self) -> std::sync::MutexGuard<'_, Vec<Arc<Link>>> {
        self.links.lock().expect("no panic inside the lock")
    }

    fn link(&self, rank: usize, stream: TcpStream) -> Result<Link, CommFailure> {
        let ready = stream.set_nodelay(true).and_then(|()| stream.set_nonblocking(true));
        ready.map_err(|cause| {
            failure(self.place.rank, format!("the connection to rank {rank} fails: {cause}"))
        })?;
        Ok(Link { rank, stream, torn: false.into(), told: false.into(), end: Mutex::default() })
    }

    fn connect(&self, rank: usize, number: u32, end: Instant) -> Result<Link, CommFailure> {
        loop {
            let left = end.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
            let made = TcpStream::connect_timeout(&self.addresses[rank], left).and_then(|mut stream| {
                stream.write_all(&words([GREETING, self.place.rank as u32, number]))?;
                Ok(stream)
            });
            match made {
                Ok(stream) => return self.link(rank, stream),
                // It listens since before this one knows of it.
                Err(cause) if cause.kind() == ErrorKind::ConnectionRefused => {
                    return Err(failure(rank, format!("rank {rank} is gone")));
                }
                Err(_) if Instant::now() < end => std::thread::sleep(Duration::from_millis(20)),
                Err(cause) => {
                    let message = format!(
                        "rank {} cannot reach rank {rank} at {}: {cause}",
                        self.place.rank, self.addresses[rank]
                    );
                    return Err(failure(rank, message));
                }
            }
        }
    }

    fn accept(&self, rank: usize, number: u32, end: Instant) -> Result<Link, CommFailure> {
        let own = self.place.rank;
        let fails = |cause: std::io::Error| failure(own, format!("rank {own} cannot listen: {cause}"));
        self.listener.set_nonblocking(true).map_err(fails)?;
        loop {
            let mut early = self.early.lock().expect("no panic inside the lock");
            if let Some(at) = early.iter().position(|(group, from, _)| (*group, *from) == (number, rank)) {
                return self.link(rank, early.swap_remove(at).2);
            }
            if Instant::now() > end {
                let seconds = self.timeout.as_secs_f32();
                return Err(failure(
                    rank,
                    format!("rank {own} has waited {seconds} s for rank {rank}, which did not come"),
                ));
            }
            match self.listener.accept() {
                Ok((mut stream, _)) => {
                    // Who is no rank of ours, or says nothing, is passed over.
                    if let Ok([GREETING, from, group]) = read_words(&mut stream) {
                        early.push((group, from as usize, stream));
                    }
                }
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    }

    /// Tells the other ranks why this one ends; theirs is then the same failure.
    pub fn leave(&self, failure: &CommFailure) {
        let text = [&(failure.rank as u32).to_le_bytes()[..], failure.message.as_bytes()].concat();
        let frame = [&head(FAILED, text.len())[..], &text].concat();
        for link in self.links().iter().filter(|link| !link.torn.swap(true, Ordering::SeqCst)) {
            // Whoever is gone needs no word, and a frame of this size fits what the system holds.
            let _ = (&link.stream).write_all(&frame);
        }
    }

    /// Says that this rank has come to its end, and is not to be missed.
    pub fn finish(&self) {
        for link in &self.watched {
            // As in `leave`.
            let _ = (&link.stream).write_all(&head(DONE, 0));
        }
    }

    /// On rank 0 why another rank has ended before its end, elsewhere why rank 0 has: for a thread that watches while this
    /// rank is where it cannot hear of it.
    pub fn lost(&self) -> Option<CommFailure> {
        self.watched.iter().find_map(|link| link.fate()).map(|(_, failure)| failure)
    }

    /// Why another rank has ended, where one has: what it said, or that it is gone. After this, collectives are over.
    pub fn fate_of_others(&self) -> Option<CommFailure> {
        let fates = self.links().iter().filter_map(|link| link.fate()).collect::<Vec<_>>();
        // Who left without a word left first: the others tell of what that did to them.
        let silent = fates.iter().position(|(told, _)| !told).unwrap_or(0);
        fates.into_iter().nth(silent).map(|(_, failure)| failure)
    }

    /// Whether rank 0 has told why it ends, or does so before `patience` is over.
    pub fn the_first_has_spoken(&self, patience: Duration) -> bool {
        let Some(first) = self.links().iter().find(|link| link.rank == 0).cloned() else { return false };
        let end = Instant::now() + patience;
        while !first.told.load(Ordering::SeqCst) && first.fate().is_none() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(5));
        }
        first.told.load(Ordering::SeqCst)
    }
}

impl Link {
    /// Whether the rank has ended before its end; and then whether it has said why.
    fn fate(&self) -> Option<(bool, CommFailure)> {
        let mut end = self.end.lock().expect("no panic inside the lock");
        if end.why.is_none() {
            end.why = self.look_for_an_end(&mut end.bytes);
        }
        end.why.clone().flatten().map(|failure| (self.told.load(Ordering::SeqCst), failure))
    }

    fn look_for_an_end(&self, bytes: &mut Vec<u8>) -> Option<Option<CommFailure>> {
        let mut part = [0; 4096];
        let ended = loop {
            match (&self.stream).read(&mut part) {
                Ok(0) => break true,
                Ok(count) => bytes.extend_from_slice(&part[..count]),
                Err(cause) => break cause.kind() != ErrorKind::WouldBlock,
            }
        };
        let mut rest = &bytes[..];
        while let Some((head, more)) = rest.split_at_checked(HEAD) {
            let (word, len) = read_head(head);
            let Some((text, more)) = more.split_at_checked(len) else { break };
            match word {
                FAILED => return Some(Some(self.told(text))),
                DONE => return Some(None),
                _ => rest = more,
            }
        }
        ended.then(|| Some(self.gone()))
    }

    /// That it ended without a word.
    fn gone(&self) -> CommFailure {
        failure(self.rank, format!("rank {} is gone", self.rank))
    }

    /// What its last frame says.
    fn told(&self, text: &[u8]) -> CommFailure {
        self.told.store(true, Ordering::SeqCst);
        let (rank, message) = text.split_at(text.len().min(4));
        let rank = rank.try_into().map_or(0, u32::from_le_bytes) as usize;
        failure(rank, String::from_utf8_lossy(message).into_owned())
    }
}

fn words<const N: usize>(words: [u32; N]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn read_words<const N: usize>(stream: &mut TcpStream) -> std::io::Result<[u32; N]> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut words = [0; N];
    for word in &mut words {
        let mut bytes = [0; 4];
        stream.read_exact(&mut bytes)?;
        *word = u32::from_le_bytes(bytes);
    }
    Ok(words)
}

fn head(word: u8, len: usize) -> [u8; HEAD] {
    let mut head = [word; HEAD];
    head[1..].copy_from_slice(&(len as u64).to_le_bytes());
    head
}

fn read_head(head: &[u8]) -> (u8, usize) {
    (head[0], u64::from_le_bytes(head[1..HEAD].try_into().expect("eight bytes")) as usize)
}

/// Where all ranks listen, and the connections over which that became known, by rank.
type Met = (Vec<SocketAddr>, Vec<(usize, TcpStream)>);

/// Rank 0 waits for the others and tells them where each one listens.
fn gather_addresses(place: &Place, port: u16, timeout: Duration, end: Instant) -> Result<Met, CommFailure> {
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
fn tell_address(place: &Place, port: u16, timeout: Duration, end: Instant) -> Result<Met, CommFailure> {
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

/// Some ranks.
#[derive(Debug)]
struct Group {
    rank: usize,
    /// This rank's number in the world.
    own: usize,
    /// By rank; None: this one.
    links: Vec<Option<Arc<Link>>>,
    timeout: Duration,
}

/// A frame on its way out or in: its head, its bytes, and how much of both is done.
struct Half<T> {
    head: [u8; HEAD],
    bytes: T,
    done: usize,
}

impl<T> Half<T> {
    fn new(head: [u8; HEAD], bytes: T) -> Self {
        Self { head, bytes, done: 0 }
    }
}

/// What became of a try.
enum Progress {
    /// It is done.
    Done,
    /// Some of it is.
    Some,
    /// Nothing could be done now.
    None,
}

impl Group {
    /// Sends more of a frame.
    fn send(&self, link: &Link, half: &mut Half<&[u8]>) -> Result<Progress, CommFailure> {
        let before = half.done;
        loop {
            let part = match half.done {
                done if done < HEAD => &half.head[done..],
                done => &half.bytes[done - HEAD..],
            };
            if part.is_empty() {
                link.torn.store(false, Ordering::SeqCst);
                return Ok(Progress::Done);
            }
            link.torn.store(true, Ordering::SeqCst);
            match (&link.stream).write(part) {
                Ok(count) => half.done += count,
                Err(cause) if cause.kind() == ErrorKind::WouldBlock => {
                    link.torn.store(half.done > 0, Ordering::SeqCst);
                    return Ok(if half.done > before { Progress::Some } else { Progress::None });
                }
                // It may have said why.
                Err(_) => return Err(link.fate().map_or_else(|| link.gone(), |(_, failure)| failure)),
            }
        }
    }

    /// Receives more of a frame.
    fn receive(
        &self,
        link: &Link,
        what: &'static str,
        half: &mut Half<&mut [u8]>,
    ) -> Result<Progress, CommFailure> {
        let before = half.done;
        loop {
            if half.done == HEAD {
                self.expect(link, what, &half.head, half.bytes.len())?;
            }
            let part = match half.done {
                done if done < HEAD => &mut half.head[done..],
                done => &mut half.bytes[done - HEAD..],
            };
            if part.is_empty() {
                return Ok(Progress::Done);
            }
            match (&link.stream).read(part) {
                Ok(count) if count > 0 => half.done += count,
                Err(cause) if cause.kind() == ErrorKind::WouldBlock => {
                    return Ok(if half.done > before { Progress::Some } else { Progress::None });
                }
                _ => return Err(link.gone()),
            }
        }
    }

    /// Whether a frame is the one that is waited for.
    fn expect(&self, link: &Link, what: &'static str, head: &[u8], len: usize) -> Result<(), CommFailure> {
        let (word, found) = read_head(head);
        if word == FAILED {
            let mut text = vec![0; found.min(1 << 16)];
            let _ = link.stream.set_nonblocking(false);
            let _ = link.stream.set_read_timeout(Some(PATIENCE));
            let whole = (&link.stream).read_exact(&mut text);
            return Err(if whole.is_ok() { link.told(&text) } else { link.gone() });
        }
        let name = *NAMES.get(usize::from(word)).unwrap_or(&"another program");
        if (name, found) != (what, len) {
            let (own, other) = (self.own, link.rank);
            let message =
                format!("rank {own} is in {what} of {len} bytes, rank {other} in {name} of {found}");
            return Err(failure(own, message));
        }
        Ok(())
    }

    fn try_trade(&self, what: &'static str, out: &[&[u8]], into: Vec<&mut [u8]>) -> Result<(), CommFailure> {
        let word = NAMES.iter().position(|name| *name == what).expect("all collectives have one") as u8;
        let mut sending: Vec<_> = Vec::new();
        let mut receiving: Vec<_> = Vec::new();
        for ((link, out), into) in self.links.iter().zip(out).zip(into) {
            let Some(link) = link else { continue };
            sending.push((link, Half::new(head(word, out.len()), *out)));
            receiving.push((link, Half::new([0; HEAD], into)));
        }
        let (start, mut idle) = (Instant::now(), 0u32);
        loop {
            let mut moved = false;
            let mut went = |progress: Progress| {
                moved |= !matches!(progress, Progress::None);
                !matches!(progress, Progress::Done)
            };
            // Everything is tried, so that of several faults the first rank's is known.
            let mut fault = None;
            let mut note = |result: Result<Progress, CommFailure>| {
                result.map_or_else(
                    |why| {
                        fault.get_or_insert(why);
                        true
                    },
                    &mut went,
                )
            };
            receiving.retain_mut(|(link, half)| note(self.receive(link, what, half)));
            sending.retain_mut(|(link, half)| note(self.send(link, half)));
            if let Some(fault) = fault {
                return Err(fault);
            }
            if receiving.is_empty() && sending.is_empty() {
                return Ok(());
            }
            if start.elapsed() > self.timeout {
                let late = receiving.iter().map(|(link, _)| link).chain(sending.iter().map(|(link, _)| link));
                let late: std::collections::BTreeSet<_> = late.map(|link| link.rank).collect();
                let named: Vec<_> = late.iter().map(usize::to_string).collect();
                let (own, seconds, named) = (self.own, self.timeout.as_secs_f32(), named.join(", "));
                let message =
                    format!("rank {own} waited {seconds} s in {what} for rank {named}, which did not come");
                return Err(failure(own, message));
            }
            // At first at once again, then without taking a core from the ranks that are waited for.
            idle = if moved { 0 } else { idle.saturating_add(1) };
            match idle {
                ..200 => std::hint::spin_loop(),
                200..2000 => std::thread::yield_now(),
                _ => std::thread::sleep(Duration::from_micros(100)),
            }
        }
    }
}

impl Trade for Group {
    fn trade(&self, what: &'static str, out: &[&[u8]], into: Vec<&mut [u8]>) {
        self.try_trade(what, out, into).unwrap_or_else(|failure| failure.leave());
    }
}

impl Communicator for Group {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.links.len()
    }

    fn all_reduce(&self, data: FloatsMut<'_>, how: Reduce) {
        trade::all_reduce(self, data, how);
    }

    fn reduce_scatter(&self, data: FloatsMut<'_>) {
        trade::reduce_scatter(self, data);
    }

    fn all_gather(&self, data: &mut [u8]) {
        trade::all_gather(self, data);
    }

    fn broadcast(&self, data: &mut [u8], root: usize) {
        let mut into: Vec<&mut [u8]> = self.links.iter().map(|_| Default::default()).collect();
        let mut out: Vec<&[u8]> = vec![&[]; self.size()];
        if self.rank == root {
            out.fill(data);
        } else {
            into[root] = data;
        }
        self.trade("broadcast", &out, into);
    }

    fn barrier(&self) {
        let none = self.links.iter().map(|_| Default::default()).collect();
        self.trade("barrier", &vec![&[][..]; self.size()], none);
    }
}
