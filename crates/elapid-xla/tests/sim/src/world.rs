//! Ranks in several processes: all meet at the address that `NEURON_RT_ROOT_COMM_ID` names, and rank 0 hands around.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

use crate::eval::Exchange;

/// The processes that run a module together.
pub(crate) struct World {
    rank: usize,
    /// On rank 0 all others by number, elsewhere rank 0.
    peers: Vec<TcpStream>,
}

impl World {
    /// Returns when all ranks have come; like the real one, it waits without end.
    pub(crate) fn meet(rank: usize, ranks: usize) -> Result<Self, String> {
        let address =
            std::env::var("NEURON_RT_ROOT_COMM_ID").map_err(|_| "NEURON_RT_ROOT_COMM_ID is not set")?;
        let failed = |cause: std::io::Error| format!("{address}: {cause}");
        let mut peers = Vec::new();
        if rank == 0 {
            let listener = TcpListener::bind(&address).map_err(failed)?;
            let mut found: Vec<Option<TcpStream>> = (1..ranks).map(|_| None).collect();
            while found.iter().any(Option::is_none) {
                let (mut stream, _) = listener.accept().map_err(failed)?;
                let mut number = [0; 4];
                stream.read_exact(&mut number).map_err(failed)?;
                let place =
                    found.get_mut(u32::from_le_bytes(number) as usize - 1).ok_or("a rank too many")?;
                *place = Some(stream);
            }
            peers.extend(found.into_iter().flatten());
        } else {
            let mut stream = loop {
                match TcpStream::connect(&address) {
                    Ok(stream) => break stream,
                    Err(_) => std::thread::sleep(Duration::from_millis(20)),
                }
            };
            stream.write_all(&(rank as u32).to_le_bytes()).map_err(failed)?;
            peers.push(stream);
        }
        let limit = std::env::var("NEURON_RT_EXEC_TIMEOUT").ok().and_then(|text| text.parse().ok());
        for peer in &peers {
            peer.set_nodelay(true).map_err(failed)?;
            peer.set_read_timeout(Some(Duration::from_secs(limit.unwrap_or(600)))).map_err(failed)?;
        }
        Ok(Self { rank, peers })
    }
}

fn send(to: &mut TcpStream, bytes: &[u8]) -> std::io::Result<()> {
    to.write_all(&(bytes.len() as u64).to_le_bytes())?;
    to.write_all(bytes)
}

fn receive(from: &mut TcpStream) -> std::io::Result<Vec<u8>> {
    let mut size = [0; 8];
    from.read_exact(&mut size)?;
    let mut bytes = vec![0; u64::from_le_bytes(size) as usize];
    from.read_exact(&mut bytes)?;
    Ok(bytes)
}

impl Exchange for World {
    fn rank(&self) -> usize {
        self.rank
    }

    fn gather(&mut self, own: Vec<u8>) -> Result<Vec<Vec<u8>>, String> {
        let mut all = || {
            if self.rank > 0 {
                let root = &mut self.peers[0];
                send(root, &own)?;
                let mut count = [0; 8];
                root.read_exact(&mut count)?;
                return (0..u64::from_le_bytes(count)).map(|_| receive(root)).collect();
            }
            let mut all = vec![own.clone()];
            for peer in &mut self.peers {
                all.push(receive(peer)?);
            }
            for peer in &mut self.peers {
                peer.write_all(&(all.len() as u64).to_le_bytes())?;
                all.iter().try_for_each(|bytes| send(peer, bytes))?;
            }
            std::io::Result::Ok(all)
        };
        all().map_err(|cause| format!("a rank is gone: {cause}"))
    }
}
