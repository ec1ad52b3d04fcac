//! A reader that refuses what candle's header reader would panic on.

use std::io::{Error, ErrorKind, Read, Result, Seek, SeekFrom};

const ALIGNMENT: &[u8] = b"general.alignment";

/// Passes all on, and refuses an alignment of 0, by which candle would divide. It sees the reads of
/// candle one by one: a key, the type of its value, the value.
pub struct Checked<R> {
    reader: R,
    /// Reads since the key of the alignment, up to its value.
    since_key: Option<usize>,
}

impl<R> Checked<R> {
    pub fn new(reader: R) -> Self {
        Self { reader, since_key: None }
    }
}

impl<R: Read> Read for Checked<R> {
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        self.reader.read(buffer)
    }

    fn read_exact(&mut self, buffer: &mut [u8]) -> Result<()> {
        self.reader.read_exact(buffer)?;
        if self.since_key == Some(1) && buffer.iter().all(|&byte| byte == 0) {
            return Err(Error::new(ErrorKind::InvalidData, "general.alignment: expected above 0, got 0"));
        }
        self.since_key = match self.since_key {
            _ if buffer == ALIGNMENT => Some(0),
            Some(0) => Some(1),
            _ => None,
        };
        Ok(())
    }
}

impl<R: Seek> Seek for Checked<R> {
    fn seek(&mut self, position: SeekFrom) -> Result<u64> {
        self.reader.seek(position)
    }

    // BufReader's own keeps what it has read ahead.
    fn stream_position(&mut self) -> Result<u64> {
        self.reader.stream_position()
    }
}
