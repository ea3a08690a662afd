"""Stands for a training in the tests of experiments: it ends, fails, dies or waits for a signal, as its script says."""
import json
import os
import shutil
import signal
import sys
import time


def main() -> int:
    given = dict(word.partition('=')[::2] for word in sys.argv[1:])
    folder = given.get('--exp-name') or os.path.dirname(os.path.dirname(given['--resume']))
    with open(os.environ['FAKE_TRAINER']) as file:
        script = json.load(file)
    name = os.path.basename(folder)
    with open(script['started'], 'a') as file:
        file.write(json.dumps([name, sys.argv[1:]]) + '\n')
    what = script['runs'].get(name, 'done')
    if what == 'fail':
        print('Traceback: it broke')
        return 1
    if what == 'die':
        os.kill(os.getpid(), signal.SIGKILL)
    os.makedirs(os.path.join(folder, 'ckpt'), exist_ok=True)
    summary = dict(script['summary'], cache=given['--cache'], seed=int(given['--seed']), exp_name=folder)
    if what == 'wait':
        signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
        write(folder, 'progress.json', dict(cache=given['--cache'], env_step=30, collected_env_step=30))
        try:
            while True:
                time.sleep(0.05)
        finally:
            shutil.copy(script['checkpoint'], os.path.join(folder, 'ckpt', 'iteration_3.pth.tar'))
            write(folder, 'summary.json', dict(summary, exit_code=130, outcome='interrupted by SIGINT', env_step=30))
    write(folder, 'summary.json', summary)
    return 0


def write(folder: str, name: str, content: dict) -> None:
    with open(os.path.join(folder, name), 'w') as file:
        json.dump(content, file)


if __name__ == '__main__':
    sys.exit(main())
