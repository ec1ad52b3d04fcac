//! Each collective gives every rank what it promises.

use star_attention::comm::Collective;

/// All three, again and again, with messages of different lengths and from different roots.
pub fn deliver(group: &dyn Collective) {
    let (rank, size) = (group.rank(), group.size());
    let me = rank as u8;
    for round in 0..300u32 {
        let len = [0, 1, 2, 3, 40, 5000][round as usize % 6];
        let mut gathered = vec![0; size * len];
        group.all_gather(&vec![me ^ round as u8; len], &mut gathered).unwrap();
        let expected: Vec<u8> = (0..size * len).map(|i| (i / len) as u8 ^ round as u8).collect();
        assert!(gathered == expected);

        let send: Vec<u8> = (0..size).map(|to| me.wrapping_mul(16) + to as u8).collect();
        let mut received = vec![0; size];
        group.all_to_all(&send, &mut received).unwrap();
        let expected: Vec<u8> = (0..size).map(|from| (from * 16) as u8 + me).collect();
        assert_eq!(received, expected);

        let root = round as usize % size;
        let mut buffer = [if rank == root { round } else { u32::MAX }; 3];
        group.broadcast(root, bytemuck::cast_slice_mut(&mut buffer)).unwrap();
        assert_eq!(buffer, [round; 3]);
    }
}

/// Messages of megabytes, of lengths that divide by no number of ranks.
pub fn broadcast_long(group: &dyn Collective) {
    let (rank, size) = (group.rank(), group.size());
    for (round, len) in [(1 << 20) + 1, 3_000_017, 65_537].into_iter().enumerate() {
        let root = (round + 1) % size;
        let byte = |i: usize| (i.wrapping_mul(2_654_435_761) >> 7) as u8 ^ round as u8;
        let mut buffer: Vec<u8> = if rank == root { (0..len).map(byte).collect() } else { vec![0; len] };
        group.broadcast(root, &mut buffer).unwrap();
        assert!((0..len).all(|i| buffer[i] == byte(i)), "of {len} bytes from {root}");

        let mut all = vec![0; size * len];
        group.all_gather(&vec![rank as u8; len], &mut all).unwrap();
        assert!(all.chunks_exact(len).enumerate().all(|(from, part)| part.iter().all(|&x| x == from as u8)));
    }
}
