//! NVML, the driver's library that tells how cards are used; opened at run time.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nvml_wrapper::enums::device::UsedGpuMemory;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::{Device, Nvml};

use super::{CardProcess, Meter, MeterError};

/// What programs computed is averaged over this time.
const OVER: Duration = Duration::from_secs(1);
/// The longest name of a program that is asked for.
const NAME_BYTES: usize = 256;

/// NVML, started.
#[derive(Debug)]
pub(super) struct NvmlMeter(Nvml);

impl NvmlMeter {
    pub(super) fn new() -> Result<Self, MeterError> {
        Nvml::init().map(Self).map_err(|error| MeterError::NoNvml(error.to_string()))
    }

    /// A card by the UUID that CUDA gives it, or a part of one: the two count cards in orders of their own.
    fn device(&self, card: &[u8; 16]) -> Result<Device<'_>, MeterError> {
        let uuid = text(card);
        let found = self.0.device_by_uuid(format!("GPU-{uuid}"));
        found.or_else(|_| self.0.device_by_uuid(format!("MIG-{uuid}"))).map_err(failed)
    }
}

/// As NVML writes it.
fn text(uuid: &[u8; 16]) -> String {
    let hex: String = uuid.iter().map(|byte| format!("{byte:02x}")).collect();
    [0..8, 8..12, 12..16, 16..20, 20..32].map(|part| hex.get(part).unwrap_or_default().to_owned()).join("-")
}

fn failed(error: NvmlError) -> MeterError {
    MeterError::Card(error.to_string())
}

/// What a card that is too old, or a part of one, does not tell.
fn supported<T>(told: Result<T, NvmlError>) -> Result<Option<T>, MeterError> {
    match told {
        Ok(told) => Ok(Some(told)),
        Err(NvmlError::NotSupported | NvmlError::FailedToLoadSymbol(_)) => Ok(None),
        Err(error) => Err(failed(error)),
    }
}

impl Meter for NvmlMeter {
    fn used_bytes(&self, card: &[u8; 16]) -> Result<u64, MeterError> {
        self.device(card)?.memory_info().map(|memory| memory.used).map_err(failed)
    }

    fn processes(&self, card: &[u8; 16]) -> Result<Vec<CardProcess>, MeterError> {
        let device = self.device(card)?;
        let mut found = supported(device.running_compute_processes())?.unwrap_or_default();
        found.extend(supported(device.running_graphics_processes())?.unwrap_or_default());
        // Some are both.
        found.sort_by_key(|process| process.pid);
        found.dedup_by_key(|process| process.pid);
        let process = |process: nvml_wrapper::struct_wrappers::device::ProcessInfo| CardProcess {
            pid: process.pid,
            name: self.0.sys_process_name(process.pid, NAME_BYTES).ok(),
            bytes: match process.used_gpu_memory {
                UsedGpuMemory::Used(bytes) => Some(bytes),
                UsedGpuMemory::Unavailable => None,
            },
        };
        Ok(found.into_iter().map(process).collect())
    }

    fn busy(&self, card: &[u8; 16]) -> Result<Option<Vec<(u32, f64)>>, MeterError> {
        let since = SystemTime::now().checked_sub(OVER).and_then(|since| since.duration_since(UNIX_EPOCH).ok());
        let since = since.map_or(0, |since| u64::try_from(since.as_micros()).unwrap_or(u64::MAX));
        match self.device(card)?.process_utilization_stats(since) {
            // Nobody computed.
            Err(NvmlError::NotFound) => Ok(Some(Vec::new())),
            told => {
                let samples = supported(told)?;
                let recent = |samples: Vec<nvml_wrapper::struct_wrappers::device::ProcessUtilizationSample>| {
                    let recent = samples.into_iter().filter(|sample| sample.timestamp > since);
                    recent.map(|sample| (sample.pid, f64::from(sample.sm_util) / 100.0)).collect()
                };
                Ok(samples.map(recent))
            }
        }
    }

    fn busy_in_all(&self, card: &[u8; 16]) -> Result<Option<f64>, MeterError> {
        let rates = supported(self.device(card)?.utilization_rates())?;
        Ok(rates.map(|rates| f64::from(rates.gpu) / 100.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uuids_are_written_as_nvml_writes_them() {
        let uuid = [0x12, 0x34, 0x56, 0x78, 0x9a, 0xbc, 0xde, 0xf0, 0, 1, 2, 3, 4, 5, 6, 0xff];
        assert_eq!(text(&uuid), "12345678-9abc-def0-0001-0203040506ff");
    }
}
