/* SPDX-License-Identifier: MIT */
/* message.c - the monitor with another way in: messages that no kernel sent. */
#include "../monitor.c"

#include <fcntl.h>

#include "fuzz.h"

void fuzz_message(struct pm_mm *mm, unsigned event, uint64_t from, uint64_t to, uint64_t len)
{
    struct uffd_msg msg = {.event = (uint8_t)event};

    if (event == UFFD_EVENT_FORK) {
        msg.arg.fork.ufd = (uint32_t)open("/dev/null", O_RDWR | O_CLOEXEC);
    } else if (event == UFFD_EVENT_REMAP) {
        msg.arg.remap.from = from;
        msg.arg.remap.to = to;
        msg.arg.remap.len = len;
    } else {
        msg.arg.remove.start = from;
        msg.arg.remove.end = from + len;
    }
    pm_lock(mm);
    handle(mm, &msg);
    pm_unlock(mm);
}
