//! Base64 (RFC 4648 section 4, padded) and hexadecimal digits.

/// Why a text does not decode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Invalid;

#[derive(Clone, Copy, Debug)]
pub struct Base64;

#[derive(Clone, Copy, Debug)]
pub struct HexLower;

pub const BASE64: Base64 = Base64;
pub const HEXLOWER: HexLower = HexLower;

const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

impl Base64 {
    #[must_use]
    pub fn encode(self, bytes: &[u8]) -> String {
        // A String that grows would leave copies of a secret behind.
        let mut out = String::with_capacity(bytes.len().div_ceil(3) * 4);
        for chunk in bytes.chunks(3) {
            let bits = chunk.iter().enumerate().fold(0_u32, |bits, (i, byte)| bits | u32::from(*byte) << (16 - 8 * i));
            for i in 0..4 {
                let digit = DIGITS[(bits >> (18 - 6 * i)) as usize & 63];
                out.push(if i <= chunk.len() { digit.into() } else { '=' });
            }
        }
        out
    }

    /// # Errors
    /// Other characters than the 64, padding that is missing or not at the end, bits beyond the last byte.
    pub fn decode(self, text: &[u8]) -> Result<Vec<u8>, Invalid> {
        let padding = text.iter().rev().take_while(|c| **c == b'=').count();
        if !text.len().is_multiple_of(4) || padding > 2 {
            return Err(Invalid);
        }
        let mut out = Vec::with_capacity(text.len() / 4 * 3);
        for chunk in text[..text.len() - padding].chunks(4) {
            let mut bits = 0;
            for i in 0..4 {
                let value = chunk.get(i).map_or(Ok(0), |c| value(*c))?;
                bits = bits << 6 | value;
            }
            let [_, bytes @ ..] = u32::to_be_bytes(bits);
            let (bytes, beyond) = bytes.split_at(chunk.len() - 1);
            if beyond.iter().any(|b| *b != 0) {
                return Err(Invalid);
            }
            out.extend_from_slice(bytes);
        }
        Ok(out)
    }
}

fn value(digit: u8) -> Result<u32, Invalid> {
    Ok(u32::from(match digit {
        b'A'..=b'Z' => digit - b'A',
        b'a'..=b'z' => digit - b'a' + 26,
        b'0'..=b'9' => digit - b'0' + 52,
        b'+' => 62,
        b'/' => 63,
        _ => return Err(Invalid),
    }))
}

impl HexLower {
    #[must_use]
    pub fn encode(self, bytes: &[u8]) -> String {
        let digit = |nibble: u8| char::from(b"0123456789abcdef"[usize::from(nibble & 15)]);
        bytes.iter().flat_map(|b| [digit(b >> 4), digit(*b)]).collect()
    }

    /// # Errors
    /// Other characters than 0-9 and a-f, or an odd number of them.
    pub fn decode(self, text: &[u8]) -> Result<Vec<u8>, Invalid> {
        if !text.len().is_multiple_of(2) {
            return Err(Invalid);
        }
        let nibble = |c: u8| match c {
            b'0'..=b'9' => Ok(c - b'0'),
            b'a'..=b'f' => Ok(c - b'a' + 10),
            _ => Err(Invalid),
        };
        text.chunks_exact(2).map(|pair| Ok(nibble(pair[0])? << 4 | nibble(pair[1])?)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rfc_4648_has_these() {
        for (plain, base64, hex) in [
            ("", "", ""),
            ("f", "Zg==", "66"),
            ("fo", "Zm8=", "666f"),
            ("foo", "Zm9v", "666f6f"),
            ("foob", "Zm9vYg==", "666f6f62"),
            ("fooba", "Zm9vYmE=", "666f6f6261"),
            ("foobar", "Zm9vYmFy", "666f6f626172"),
        ] {
            assert_eq!(BASE64.encode(plain.as_bytes()), base64);
            assert_eq!(BASE64.decode(base64.as_bytes()).as_deref(), Ok(plain.as_bytes()));
            assert_eq!(HEXLOWER.encode(plain.as_bytes()), hex);
            assert_eq!(HEXLOWER.decode(hex.as_bytes()).as_deref(), Ok(plain.as_bytes()));
        }
    }

    #[test]
    fn all_bytes_come_back() {
        let mut rng = fastrand::Rng::with_seed(1);
        for len in 0..300 {
            let bytes: Vec<u8> = std::iter::repeat_with(|| rng.u8(..)).take(len).collect();
            assert_eq!(BASE64.decode(BASE64.encode(&bytes).as_bytes()).as_ref(), Ok(&bytes));
            assert_eq!(HEXLOWER.decode(HEXLOWER.encode(&bytes).as_bytes()).as_ref(), Ok(&bytes));
        }
    }

    #[test]
    fn nothing_else_is_taken() {
        // Missing, misplaced and surplus padding, bits beyond the end, other alphabets, white space.
        for bad in
            ["Zg", "Zg=", "Z===", "====", "=", "Zg==Zg==", "Z=g=", "Zh==", "Zm9=", "Zm-v", "Zm_v", "Zm9v\n", " Zg="]
        {
            assert_eq!(BASE64.decode(bad.as_bytes()), Err(Invalid), "{bad:?}");
        }
        for bad in ["6", "6G", "6F", " 6"] {
            assert_eq!(HEXLOWER.decode(bad.as_bytes()), Err(Invalid), "{bad:?}");
        }
    }
}
