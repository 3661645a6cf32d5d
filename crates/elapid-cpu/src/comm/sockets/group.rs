//! Collectives of some ranks.

use std::collections::BTreeSet;
use std::io::{ErrorKind, Read, Write};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::super::trade::{self, Trade};
use super::super::{CommFailure, Communicator, FloatsMut, Reduce};
use super::{FAILED, HEAD, Link, NAMES, PATIENCE, failure, head, read_head};

/// Some ranks.
#[derive(Debug)]
pub(super) struct Group {
    pub(super) rank: usize,
    /// This rank's number in the world.
    pub(super) own: usize,
    /// By rank; None: this one.
    pub(super) links: Vec<Option<Arc<Link>>>,
    pub(super) timeout: Duration,
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
                let late: BTreeSet<_> = late.map(|link| link.rank).collect();
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
