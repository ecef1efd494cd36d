//! The pages of a column in a row group, read one after another from a stream.

use std::io::{self, Read};

use parquet::basic::{Compression, Type};
use parquet::column::page::{Page, PageMetadata, PageReader};
use parquet::errors::{ParquetError, Result};
use parquet::file::metadata::ColumnChunkMetaData;

use super::header::{Header, Kind};
use super::spill::Resident;
use super::unpack::unpacked;

/// Reads pages. What a page says of itself is checked before the decoders allocate memory by it.
pub(super) struct Pages<R> {
    from: io::Take<R>,
    packing: Compression,
    /// Bytes that a value has at least.
    least: u64,
    /// Values that pages to come hold.
    values_left: u64,
    resident: Resident,
}

impl<R: Read + Send> Pages<R> {
    pub(super) fn new(from: R, bytes: u64, chunk: &ColumnChunkMetaData, resident: Resident) -> Pages<R> {
        let least = match chunk.column_type() {
            Type::INT32 | Type::FLOAT | Type::BYTE_ARRAY => 4,
            Type::INT64 | Type::DOUBLE => 8,
            Type::BOOLEAN | Type::INT96 | Type::FIXED_LEN_BYTE_ARRAY => 1,
        };
        let values_left = u64::try_from(chunk.num_values()).unwrap_or(0);
        Pages { from: from.take(bytes), packing: chunk.compression(), least, values_left, resident }
    }

    fn next_page(&mut self) -> io::Result<Option<Page>> {
        while self.values_left > 0 {
            let header = Header::read(&mut self.from)?;
            if header.packed > self.from.limit() {
                return Err(io::Error::other("a page is longer than its column"));
            }
            let mut from = Checked { from: self.from.by_ref().take(header.packed), crc: crc32fast::Hasher::new() };
            let page = page(&header, &mut from, self.packing, &self.resident)?;
            // Whatever unpacking left unread, so that the next header follows.
            io::copy(&mut from, &mut io::sink())?;
            if from.from.limit() > 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            if header.crc.is_some_and(|crc| crc != from.crc.clone().finalize()) {
                return Err(io::Error::other("a page's checksum is wrong"));
            }
            match &page {
                None => continue,
                Some(Page::DictionaryPage { num_values, .. }) if u64::from(*num_values) * self.least > header.unpacked => {
                    return Err(io::Error::other("a dictionary is said to hold more values than it has room for"));
                }
                Some(Page::DictionaryPage { .. }) => {}
                Some(page) => {
                    let left = self.values_left.checked_sub(page.num_values().into());
                    self.values_left = left.ok_or_else(|| io::Error::other("its pages hold more values than there are rows"))?;
                }
            }
            return Ok(page);
        }
        Ok(None)
    }
}

/// Reads the page that follows a header; none if it holds no values.
fn page(header: &Header, from: &mut (impl Read + Send), packing: Compression, resident: &Resident) -> io::Result<Option<Page>> {
    let whole = |from: &mut (dyn Read + Send)| resident.collect(&mut *unpacked(packing, from)?, header.unpacked);
    Ok(Some(match header.kind {
        Kind::Other => return Ok(None),
        Kind::Dictionary { values, encoding, is_sorted } => {
            Page::DictionaryPage { buf: whole(from)?, num_values: values, encoding, is_sorted }
        }
        Kind::Data { values, encoding, def_levels, rep_levels } => Page::DataPage {
            buf: whole(from)?,
            num_values: values,
            encoding,
            def_level_encoding: def_levels,
            rep_level_encoding: rep_levels,
            statistics: None,
        },
        Kind::DataV2 { values, nulls, rows, encoding, def_bytes, rep_bytes, packed } => {
            let levels = u64::from(def_bytes) + u64::from(rep_bytes);
            if levels > header.unpacked || nulls > values {
                return Err(io::Error::other("a page says of itself what cannot be"));
            }
            let mut head = Vec::new();
            from.by_ref().take(levels).read_to_end(&mut head)?;
            // Where all values are null there is nothing to unpack, not even a frame of the packing's.
            let packing = if packed && levels < header.unpacked { packing } else { Compression::UNCOMPRESSED };
            let rest = unpacked(packing, from)?;
            Page::DataPageV2 {
                buf: resident.collect(&mut head.chain(rest), header.unpacked)?,
                num_values: values,
                encoding,
                num_nulls: nulls,
                num_rows: rows,
                def_levels_byte_len: def_bytes,
                rep_levels_byte_len: rep_bytes,
                is_compressed: false,
                statistics: None,
            }
        }
    }))
}

/// Takes the CRC of what is read.
struct Checked<R> {
    from: R,
    crc: crc32fast::Hasher,
}

impl<R: Read> Read for Checked<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.from.read(buf)?;
        self.crc.update(&buf[..n]);
        Ok(n)
    }
}

impl<R: Read + Send> Iterator for Pages<R> {
    type Item = Result<Page>;

    fn next(&mut self) -> Option<Self::Item> {
        self.get_next_page().transpose()
    }
}

impl<R: Read + Send> PageReader for Pages<R> {
    fn get_next_page(&mut self) -> Result<Option<Page>> {
        self.next_page().map_err(|error| ParquetError::External(Box::new(error)))
    }

    fn peek_next_page(&mut self) -> Result<Option<PageMetadata>> {
        Err(ParquetError::NYI("pages are not looked at in advance".into()))
    }

    fn skip_next_page(&mut self) -> Result<()> {
        Err(ParquetError::NYI("pages are not skipped".into()))
    }

    fn at_record_boundary(&mut self) -> Result<bool> {
        // Only flat columns are read: every value is a record.
        Ok(true)
    }
}
