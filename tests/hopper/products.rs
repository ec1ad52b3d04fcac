//! Where products of warp groups find their operands: A is one-hot, each element of B its own
//! index.

use crate::launch;
use star_attention::Result;
use star_attention::cuda::simt::Simt;

#[derive(Clone, Copy)]
#[repr(C)]
struct WgmmaParams {
    out: u64,
    start: u32,
    leading: u32,
    stride: u32,
    transposed: u32,
    bytes: u32,
    shift: u32,
    a_in_registers: u32,
    padding: u32,
}

/// How B lies in its memory.
#[derive(Clone, Copy, Debug)]
struct Form {
    columns: u32,
    start: u32,
    leading: u32,
    stride: u32,
    transposed: bool,
}

impl Form {
    /// Of an element, by the documentation's formula.
    fn index(&self, n: u32, k: u32) -> u32 {
        let Self { start, leading, stride, transposed, .. } = *self;
        let address = if transposed {
            start + n / 64 * leading + k / 8 * stride + k % 8 * 128 + n % 64 * 2
        } else {
            start + n / 8 * stride + n % 8 * 128 + 2 * k
        };
        (address ^ (((address >> 7) & 7) << 4)) / 2
    }

    fn bytes(&self) -> u32 {
        let pairs = (0..self.columns).flat_map(|n| (0..16).map(move |k| (n, k)));
        2 * (pairs.map(|(n, k)| self.index(n, k)).max().unwrap() + 1).next_multiple_of(512)
    }

    /// For each column and depth the index of the element that was multiplied.
    fn read(&self, a_in_registers: bool) -> Result<Vec<[u32; 16]>> {
        let simt = Simt::new(3);
        let columns = self.columns as usize;
        let mut elements = vec![[0; 16]; columns];
        for shift in [0, 10] {
            let mut out = simt.buffer(&vec![f32::NAN; 64 * columns]);
            let params = WgmmaParams {
                out: out.span_mut().address(),
                start: self.start,
                leading: self.leading,
                stride: self.stride,
                transposed: self.transposed.into(),
                bytes: self.bytes(),
                shift,
                a_in_registers: a_in_registers.into(),
                padding: 0,
            };
            let kernel = format!("probe_wgmma_n{columns}");
            launch(&simt, &kernel, [1, 128, 1024 + 64 * 128 + self.bytes()], &params)?;
            for (m, row) in out.as_slice().chunks(columns).enumerate() {
                for (n, &x) in row.iter().enumerate() {
                    let part = (x as u32) << shift;
                    let element = &mut elements[n][m % 16];
                    if m < 16 {
                        *element |= part;
                    }
                    assert_eq!(*element & (1023 << shift), part, "rows {m} and {} of the product", m % 16);
                }
            }
        }
        Ok(elements)
    }
}

fn forms(columns: u32) -> [Form; 6] {
    let form = |start, leading, stride, transposed| Form { columns, start, leading, stride, transposed };
    [
        form(0, 16, 1024, false),
        // The second and the last 16 of a row's depth, behind a tile.
        form(32, 16, 1024, false),
        form(2048 + 96, 0, 1024, false),
        // Each second group of eight rows.
        form(0, 16, 2048, false),
        // Panels of 64 columns: of 16 depths, and of 80, from which the last are taken.
        form(0, 2048, 1024, true),
        form(64 * 128, 80 * 128, 1024, true),
    ]
}

#[test]
fn elements_are_read_where_the_descriptor_says() {
    for columns in [64, 80, 96, 112, 128, 176, 192, 256] {
        for form in forms(columns) {
            for a_in_registers in [false, true] {
                let read = form.read(a_in_registers).unwrap();
                for (n, column) in read.iter().enumerate() {
                    let expected: [u32; 16] = std::array::from_fn(|k| form.index(n as u32, k as u32));
                    assert_eq!(*column, expected, "column {n} of {form:?}");
                }
            }
        }
    }
}

#[test]
fn descriptors_that_are_not_aligned() {
    for (start, transposed) in [(16, false), (128, false), (32, true), (1024 + 512, true)] {
        let form = Form { columns: 64, start, leading: 2048, stride: 1024, transposed };
        let error = form.read(false).unwrap_err().to_string();
        assert!(error.contains("pattern begins"), "{error}");
    }
}

/// The descriptor reaches further than the memory that was written.
#[test]
fn operands_that_nobody_wrote() {
    let form = Form { columns: 64, start: 0, leading: 16, stride: 1024, transposed: false };
    let simt = Simt::new(0);
    let mut out = simt.buffer(&[0f32; 64 * 64]);
    let params = WgmmaParams {
        out: out.span_mut().address(),
        start: 1024,
        leading: form.leading,
        stride: form.stride,
        transposed: 0,
        bytes: form.bytes(),
        shift: 0,
        a_in_registers: 0,
        padding: 0,
    };
    let shared = 64 * 128 + form.bytes();
    for (shared, expected) in [(shared + 1024, "where nothing was written"), (shared, "shared memory: bytes")]
    {
        let error = launch(&simt, "probe_wgmma_n64", [1, 128, shared], &params).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}
