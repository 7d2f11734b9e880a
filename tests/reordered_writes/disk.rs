//! A disk that records each write and each flush, in their order: a file whose content this process serves over FUSE, for a
//! loop device to stand on.
//!
//! What the kernel and this process say to each other is described in `fuse(4)` and in `linux/fuse.h`, protocol 7.31.

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

/// What was asked of the disk.
#[derive(Clone, Debug)]
pub(crate) enum Recorded {
    Write { offset: u64, data: Vec<u8> },
    Flush,
}

/// Bytes of one write at most.
const WRITE_MAX: u32 = 1 << 20;
const IN_HEADER: usize = 40;
const WRITE_HEADER: usize = 40;
const ENOSYS: i32 = 38;
const EOPNOTSUPP: i32 = 95;

/// What the kernel may ask.
mod opcode {
    pub(super) const FORGET: u32 = 2;
    pub(super) const GETATTR: u32 = 3;
    pub(super) const SETATTR: u32 = 4;
    pub(super) const OPEN: u32 = 14;
    pub(super) const READ: u32 = 15;
    pub(super) const WRITE: u32 = 16;
    pub(super) const STATFS: u32 = 17;
    pub(super) const RELEASE: u32 = 18;
    pub(super) const FSYNC: u32 = 20;
    pub(super) const FLUSH: u32 = 25;
    pub(super) const INIT: u32 = 26;
    pub(super) const INTERRUPT: u32 = 36;
    pub(super) const DESTROY: u32 = 38;
    pub(super) const BATCH_FORGET: u32 = 42;
    pub(super) const FALLOCATE: u32 = 43;
}

/// The disk; its file is there while it lives.
pub(crate) struct RecordingDisk {
    pub(crate) file: PathBuf,
    recorded: Arc<Mutex<Vec<Recorded>>>,
    server: Option<JoinHandle<()>>,
}

impl RecordingDisk {
    /// Serves `content` as `file`, and says in the file `position` how much has been recorded.
    ///
    /// # Errors
    /// If FUSE or the right to mount is missing.
    pub(crate) fn serve(file: &Path, content: Vec<u8>, position: &Path) -> io::Result<Self> {
        File::create(file)?;
        let position = File::create(position)?;
        position.write_all_at(&0_u64.to_le_bytes(), 0)?;
        let fuse = OpenOptions::new().read(true).write(true).open("/dev/fuse")?;
        let options = format!("fd={},rootmode=100600,user_id=0,group_id=0", fuse.as_raw_fd());
        let options = CString::new(options).expect("no zeros");
        mount("oncegate-test", file, "fuse", MountFlags::NOSUID | MountFlags::NODEV, options.as_c_str())?;
        let recorded = Arc::new(Mutex::new(Vec::new()));
        let mut server = Server { fuse, content, position, recorded: recorded.clone() };
        let server = std::thread::spawn(move || server.run());
        Ok(Self { file: file.to_owned(), recorded, server: Some(server) })
    }

    /// What has been recorded so far.
    pub(crate) fn recorded(&self) -> Vec<Recorded> {
        self.recorded.lock().unwrap().clone()
    }
}

impl Drop for RecordingDisk {
    fn drop(&mut self) {
        // Who still has it mounted loses it.
        let ended = unmount(&self.file, UnmountFlags::empty()).or_else(|_| unmount(&self.file, UnmountFlags::DETACH));
        if let (Ok(()), Some(server)) = (ended, self.server.take()) {
            let _ = server.join();
        }
    }
}

struct Server {
    fuse: File,
    content: Vec<u8>,
    position: File,
    recorded: Arc<Mutex<Vec<Recorded>>>,
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

impl Server {
    /// One request after the other, so that their order is what it seems: until the file is unmounted.
    fn run(&mut self) {
        let mut request = vec![0; WRITE_MAX as usize + 4096];
        loop {
            let len = match self.fuse.read(&mut request) {
                Ok(0) => return,
                Ok(len) => len,
                Err(error) if matches!(error.raw_os_error(), Some(4 | 2 | 11)) => continue,
                Err(_) => return,
            };
            let (header, body) = request[..len].split_at(IN_HEADER);
            let (asked, unique) = (u32_at(header, 4), u64_at(header, 8));
            let answer = match asked {
                opcode::FORGET | opcode::BATCH_FORGET | opcode::INTERRUPT => continue,
                opcode::READ => {
                    let (offset, len) = (u64_at(body, 8) as usize, u32_at(body, 16) as usize);
                    let end = (offset + len).min(self.content.len());
                    reply(unique, self.content.get(offset..end).unwrap_or_default())
                }
                opcode::WRITE => {
                    let (offset, len) = (u64_at(body, 8), u32_at(body, 16));
                    self.write(offset, &body[WRITE_HEADER..WRITE_HEADER + len as usize]);
                    reply(unique, &[len.to_le_bytes(), [0; 4]].concat())
                }
                opcode::FSYNC => {
                    self.record(Recorded::Flush);
                    reply(unique, &[])
                }
                opcode::INIT => reply(unique, &init(body)),
                opcode::GETATTR | opcode::SETATTR => reply(unique, &self.attributes()),
                opcode::OPEN => reply(unique, &[0; 16]),
                opcode::STATFS => reply(unique, &[0; 80]),
                opcode::FLUSH | opcode::RELEASE | opcode::DESTROY => reply(unique, &[]),
                opcode::FALLOCATE => refuse(unique, EOPNOTSUPP),
                _ => refuse(unique, ENOSYS),
            };
            // It may have been interrupted, or unmounted, meanwhile.
            let _ = self.fuse.write(&answer);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let at = offset as usize;
        self.content[at..at + data.len()].copy_from_slice(data);
        self.record(Recorded::Write { offset, data: data.to_vec() });
    }

    /// Told before the kernel hears that it is done.
    fn record(&mut self, what: Recorded) {
        let mut recorded = self.recorded.lock().unwrap();
        recorded.push(what);
        self.position.write_all_at(&(recorded.len() as u64).to_le_bytes(), 0).unwrap();
    }

    /// Of a regular file: `fuse_attr_out`.
    fn attributes(&self) -> Vec<u8> {
        let len = self.content.len() as u64;
        let mut out = vec![0; 16];
        for field in [1, len, len / 512, 0, 0, 0] {
            out.extend_from_slice(&u64::to_le_bytes(field));
        }
        // Nanoseconds of three times, mode, links, owner, group, device, block size, flags.
        for field in [0, 0, 0, 0o100_600, 1, 0, 0, 0, 4096, 0] {
            out.extend_from_slice(&u32::to_le_bytes(field));
        }
        out
    }
}

/// `fuse_init_out`, with large writes.
fn init(body: &[u8]) -> Vec<u8> {
    const BIG_WRITES: u32 = 1 << 5;
    const MAX_PAGES: u32 = 1 << 22;
    let read_ahead = u32_at(body, 8);
    let mut out = Vec::new();
    for field in [7, 31, read_ahead, BIG_WRITES | MAX_PAGES, 0, WRITE_MAX, 1, WRITE_MAX / 4096] {
        out.extend_from_slice(&u32::to_le_bytes(field));
    }
    out.resize(64, 0);
    out
}

fn reply(unique: u64, body: &[u8]) -> Vec<u8> {
    answer(unique, 0, body)
}

fn refuse(unique: u64, error: i32) -> Vec<u8> {
    answer(unique, -error, &[])
}

fn answer(unique: u64, error: i32, body: &[u8]) -> Vec<u8> {
    let mut out = ((16 + body.len()) as u32).to_le_bytes().to_vec();
    out.extend_from_slice(&error.to_le_bytes());
    out.extend_from_slice(&unique.to_le_bytes());
    out.extend_from_slice(body);
    out
}
