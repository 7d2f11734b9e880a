//! The file `store`: which store this is, and its settings. Without it the log is of no use: the secret that makes
//! ids of keys is in it.

use super::OpenError;
use crate::store::files::{self, Fields};
use crate::store::log::segment::StoreId;
use std::collections::BTreeMap;
use std::io;
use std::path::Path;

pub(super) const STORE_FILE: &str = "store";
const MAGIC: [u8; 8] = *b"ONCEGATE";
const FORMAT: u32 = 1;

#[derive(Clone, Debug)]
pub(super) struct Settings {
    pub(super) id: StoreId,
    /// Whether the log was created completely. From then on a missing log is a lost one.
    pub(super) initialised: bool,
    pub(super) values: BTreeMap<String, Vec<u8>>,
}

impl Settings {
    pub(super) fn write(&self, dir: &Path) -> io::Result<()> {
        let mut out = MAGIC.to_vec();
        out.extend_from_slice(&FORMAT.to_le_bytes());
        out.extend_from_slice(&self.id);
        out.push(u8::from(self.initialised));
        for (name, value) in &self.values {
            for bytes in [name.as_bytes(), value] {
                out.extend_from_slice(&u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_le_bytes());
                out.extend_from_slice(bytes);
            }
        }
        files::replace(dir, STORE_FILE, &files::seal(out))
    }

    /// Reads the file; `None` if there is none.
    pub(super) fn read(dir: &Path) -> Result<Option<Self>, OpenError> {
        let file = dir.join(STORE_FILE);
        let bytes = match std::fs::read(&file) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(OpenError::Io { what: "read", path: file, source }),
        };
        let version = bytes.strip_prefix(&MAGIC).and_then(|rest| Fields(rest).u32());
        if let Some(version) = version.filter(|&version| version != FORMAT) {
            return Err(OpenError::Format { path: file, version });
        }
        files::checked(&bytes).and_then(Self::parse).map(Some).ok_or(OpenError::SettingsDamaged { path: file })
    }

    fn parse(bytes: &[u8]) -> Option<Self> {
        let mut fields = Fields(bytes);
        if fields.array() != Some(MAGIC) || fields.u32() != Some(FORMAT) {
            return None;
        }
        let mut settings = Self { id: fields.array()?, initialised: fields.u8()? == 1, values: BTreeMap::new() };
        while !fields.0.is_empty() {
            let mut string = || {
                let len = usize::try_from(fields.u32()?).ok()?;
                fields.bytes(len)
            };
            let (name, value) = (string()?, string()?);
            settings.values.insert(std::str::from_utf8(name).ok()?.to_owned(), value.to_vec());
        }
        Some(settings)
    }
}
