//! Ranks that are processes, over TCP: for those that no MPI connects, such as one process a core of an accelerator.
//!
//! Each rank listens at a port of its own and tells rank 0, which waits at one that all know, and answers with the
//! addresses of all. Then any two ranks of a group have a connection. What travels on it are frames: a word that says
//! which collective it belongs to, a length, bytes. A rank that fails says why in a last frame; one that is killed is known
//! by the end of its connections.

mod group;
mod meeting;

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use self::group::Group;
use self::meeting::{gather_addresses, tell_address};
use super::{CommFailure, Communicator, Single};

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
    /// Where ranks of higher numbers find this one.
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
